-- The ledger of a shared quota: runner/sharing/ledger.py and runner/bucket.py, in one step on the server and its time.
-- KEYS[1]: the ledger. ARGV[1]: the order, the limits and the constants, as JSON. Returns a slice, as JSON.

local order = cjson.decode(ARGV[1])
local null = cjson.null

local now = order.now
if now == null then
  local time = redis.call('TIME')
  now = tonumber(time[1]) + math.floor(tonumber(time[2]) / 1000) / 1000 -- JSON carries milliseconds exactly
end

local stored = redis.call('GET', KEYS[1])
local ledger = stored and cmsgpack.unpack(stored)
  or {version = 0, paused_until = 0, reason = '', tickets = {}, buckets = {}}

-- Buckets

local function bucket_of(limit)
  local bucket = ledger.buckets[limit.name]
  if not bucket then
    bucket = {
      level = limit.burst, ceiling = limit.burst, updated = 0, synced = -1,
      foreign = 0, foreign_at = 0, foreign_s = 0, spans = {}, amounts = {},
    }
    ledger.buckets[limit.name] = bucket
  end
  bucket.limit, bucket.burst, bucket.window_s = limit.amount, limit.burst, limit.window_s
  bucket.rate = limit.amount / limit.window_s
  bucket.width_s = limit.window_s / order.spans
  bucket.keep_s = limit.window_s + order.keep_longer_s
  bucket.charged = 0
  for _, amount in ipairs(bucket.amounts) do bucket.charged = bucket.charged + amount end
  return bucket
end

local function update(bucket)
  if now > bucket.updated then
    local filled = math.min(bucket.ceiling, bucket.level + (now - bucket.updated) * bucket.rate)
    bucket.level = math.max(bucket.level, filled)
  end
  bucket.updated = now
  local last = math.floor((now - bucket.keep_s) / bucket.width_s) - 1
  while bucket.spans[1] and bucket.spans[1] <= last do
    table.remove(bucket.spans, 1)
    bucket.charged = bucket.charged - table.remove(bucket.amounts, 1)
  end
  if #bucket.spans == 0 then bucket.charged = 0 end
end

local function foreign(bucket)
  local left_s = bucket.foreign_at + bucket.foreign_s - now
  if left_s <= 0 then return 0 end
  return bucket.foreign * math.min(1, left_s / math.max(1e-9, bucket.foreign_s - order.heard_s))
end

local function room_s(bucket, excess)
  local all_back_s = math.max(0, bucket.foreign_at + bucket.foreign_s - now)
  local theirs = foreign(bucket)
  local back_s = math.huge
  if theirs >= excess then back_s = all_back_s * (1 - (theirs - excess) / bucket.foreign) end
  excess = excess - order.rounding * bucket.limit
  for i, amount in ipairs(bucket.amounts) do
    excess = excess - amount
    if excess <= 0 then
      return math.min(back_s, (bucket.spans[i] + 1) * bucket.width_s + bucket.keep_s - now)
    end
  end
  return math.min(back_s, all_back_s)
end

local function wait_s(bucket, cost, is_next)
  if is_next then bucket.ceiling = math.max(bucket.burst, cost) end
  local pace_s = math.max(0, (cost - bucket.level) / bucket.rate)
  local excess = bucket.charged + cost + foreign(bucket) - bucket.limit
  if excess <= order.rounding * bucket.limit then return pace_s end
  return math.max(pace_s, room_s(bucket, excess))
end

local function take(bucket, cost)
  local span = math.floor(now / bucket.width_s)
  local last = #bucket.spans
  if bucket.spans[last] == span then
    bucket.amounts[last] = bucket.amounts[last] + cost
  else
    bucket.spans[last + 1], bucket.amounts[last + 1] = span, cost
  end
  bucket.charged = bucket.charged + cost
  bucket.level = bucket.level - cost
  bucket.ceiling = bucket.burst
end

local function give_back(bucket, amount, at, sent)
  amount = math.max(amount, -bucket.limit)
  local span = math.floor(at / bucket.width_s)
  for i = #bucket.spans, 1, -1 do
    if bucket.spans[i] == span then
      bucket.amounts[i] = bucket.amounts[i] - amount
      bucket.charged = bucket.charged - amount
      bucket.level = math.min(bucket.level + amount, bucket.limit)
      if sent and amount > 0 and now < bucket.foreign_at + bucket.foreign_s then
        bucket.foreign = math.min(bucket.foreign + amount, bucket.limit)
      end
      return
    end
  end
  bucket.level = bucket.level + math.min(0, amount)
end

local function sync(bucket, remaining, reset_s, charged, at)
  if at < bucket.synced then return end
  bucket.synced = at
  if reset_s == null then reset_s = bucket.window_s end
  bucket.foreign = math.min(math.max(0, bucket.limit - charged - remaining), bucket.limit)
  bucket.foreign_at, bucket.foreign_s = now, math.min(reset_s, bucket.window_s)
end

-- What the order says

local buckets = {}
for i, limit in ipairs(order.limits) do
  buckets[i] = bucket_of(limit)
  update(buckets[i])
end

local lost = order.version > ledger.version
if lost then
  for i, bucket in ipairs(buckets) do
    if bucket.window_s < order.day_s then
      take(bucket, bucket.limit)
    elseif order.seen[i] > bucket.charged then
      take(bucket, order.seen[i] - bucket.charged)
    end
  end
end
ledger.version = math.max(ledger.version, order.version) + 1

for _, back in ipairs(order.returns) do
  for i, amount in ipairs(back[2]) do give_back(buckets[i], amount, back[1], back[3]) end
end
for _, heard in ipairs(order.heard) do
  sync(buckets[heard[1] + 1], heard[2], heard[3], heard[4], heard[5])
end
if now + order.pause_s > math.max(now, ledger.paused_until) then
  ledger.paused_until, ledger.reason = now + order.pause_s, order.reason
end

-- What it gets

local slice = {amounts = null, at = now, wait_s = 0, ask_again_s = 0, lost = lost, version = ledger.version}

local tickets = {}
local mine
for _, ticket in ipairs(ledger.tickets) do
  if now - ticket[2] <= order.ticket_s then
    tickets[#tickets + 1] = ticket
    if ticket[1] == order.holder then mine = #tickets end
  end
end

local function show_ticket()
  if mine then tickets[mine][2] = now else tickets[#tickets + 1] = {order.holder, now} end
end

if order.need == null then
  if mine then table.remove(tickets, mine) end
elseif now < ledger.paused_until then
  slice.ask_again_s = ledger.paused_until - now
elseif tickets[1] and tickets[1][1] ~= order.holder then
  show_ticket()
  for i, bucket in ipairs(buckets) do
    slice.wait_s = math.max(slice.wait_s, wait_s(bucket, order.need[i], false))
  end
  slice.ask_again_s = order.poll_s
else
  local part = 1
  for i, bucket in ipairs(buckets) do
    if order.want[i] > 0 then
      local most = bucket.rate * order.slice_s
      if bucket.window_s >= order.day_s then
        most = math.min(bucket.level, bucket.limit - bucket.charged - foreign(bucket))
      end
      part = math.max(0, math.min(part, most / order.want[i]))
    end
  end
  local amounts = {}
  for i, bucket in ipairs(buckets) do
    amounts[i] = math.max(order.need[i], part * order.want[i])
    slice.wait_s = math.max(slice.wait_s, wait_s(bucket, amounts[i], true))
  end
  if slice.wait_s > 0 then
    show_ticket()
    slice.ask_again_s = math.min(slice.wait_s, order.longest_poll_s)
  else
    if mine then table.remove(tickets, mine) end
    for i, bucket in ipairs(buckets) do take(bucket, amounts[i]) end
    slice.amounts = amounts
  end
end
ledger.tickets = tickets

slice.paused_s = math.max(0, ledger.paused_until - now)
slice.reason = slice.paused_s > 0 and ledger.reason or ''
slice.charged = {}
for i, bucket in ipairs(buckets) do slice.charged[i] = bucket.charged end
redis.call('SET', KEYS[1], cmsgpack.pack(ledger), 'EX', order.keep_key_s)
return cjson.encode(slice)
