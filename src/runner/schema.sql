-- A run's results.sqlite. Times are Unix seconds, durations seconds, money US dollars.

-- What the run is: the name of a fact, and its value.
CREATE TABLE meta (
    name  TEXT PRIMARY KEY,
    value TEXT NOT NULL
) WITHOUT ROWID;

-- One row an invocation of the run; last_seen moves with every commit once something is asked, so it survives a kill.
CREATE TABLE sessions (
    id         INTEGER PRIMARY KEY,
    started_at REAL NOT NULL,
    last_seen  REAL NOT NULL,
    ended_at   REAL -- NULL: running, or killed
);

-- The dataset as it is now, or as much of it as has been read since it was changed: what is asked at each position.
CREATE TABLE rows (
    position   INTEGER PRIMARY KEY, -- dataset index × samples + sample
    content    BLOB NOT NULL,       -- 16-byte hash of endpoint, model, input, parameters, schema, sample
    ticket     INTEGER NOT NULL,    -- of its answer, whether that is there or not; rows that share one have one ticket
    metadata   TEXT,                -- JSON object of the row's own fields
    scores     TEXT,                -- JSON object, score by scorer; NULL: not scored yet
    asked_at   REAL,                -- when a session took it up to be asked; NULL: it had an answer
    session    INTEGER,             -- the session that took it up
    cost_bound_usd REAL             -- the most that one attempt at it costs; NULL: not to be known
);

-- What came of it: an answer, or the error that the row ended in. Found by its ticket and not by what it answers: an
-- index of hashes is written at random places, and slows a long run down. Some answers belong to no row any more.
CREATE TABLE answers (
    ticket            INTEGER PRIMARY KEY,
    content           BLOB NOT NULL,
    settled_at        REAL NOT NULL,
    output_text       TEXT,
    details           TEXT,    -- JSON object: whatever else the answer holds
    finish_reason     TEXT,
    request_id        TEXT,
    model_id          TEXT,
    prompt_tokens     INTEGER,
    completion_tokens INTEGER,
    total_tokens      INTEGER,
    reasoning_tokens  INTEGER,
    cached_tokens     INTEGER,
    error_type        TEXT,    -- NULL: answered
    error_message     TEXT,
    error_status      INTEGER,
    deployment        TEXT,
    retries           INTEGER NOT NULL,
    queue_wait_s      REAL NOT NULL,
    service_time_s    REAL NOT NULL,
    end_to_end_s      REAL NOT NULL,
    ttft_s            REAL,
    cost_usd          REAL,    -- NULL: unknown
    cost_bound_usd    REAL,    -- where the cost is unknown: the most that it can be; NULL: not to be known
    embedding         BLOB,    -- of an embedding: its vector
    reused_from       TEXT,    -- the run that was asked and paid; NULL: this one
    shared            INTEGER NOT NULL DEFAULT 0 -- 1: of a request that is counted with another of its rows
);
CREATE INDEX answers_failed ON answers (error_type) WHERE error_type IS NOT NULL;

-- The ledger of every attempt that did not become a row's outcome: those that were retried, failed rows that were
-- taken up again, answers that were given up, and those whose answer never came because the process ended.
CREATE TABLE attempts (
    id             INTEGER PRIMARY KEY,
    content        BLOB NOT NULL,
    number         INTEGER,
    deployment     TEXT,
    started_at     REAL,          -- of one that was lost: at the latest
    service_time_s REAL,
    error_type     TEXT NOT NULL, -- 'Lost': the process ended before the outcome was known; 'GivenUp': an answer
    error_message  TEXT,
    error_status   INTEGER,
    cost_usd       REAL,          -- NULL: unknown
    cost_bound_usd REAL,          -- where the cost is unknown: the most that it can be; NULL: not to be known
    shared         INTEGER NOT NULL DEFAULT 0 -- 1: an attempt that is counted with another of its rows
);

-- Files that rows name and that were read to know what they hold, as they were then.
CREATE TABLE files (
    path     BLOB PRIMARY KEY, -- absolute, as the file system has it
    size     INTEGER NOT NULL, -- bytes
    mtime_ns INTEGER NOT NULL, -- when it was modified, Unix nanoseconds
    digest   BLOB NOT NULL     -- 16-byte hash of its content
) WITHOUT ROWID;
