"""Which deployments share a limiter."""

from __future__ import annotations

from runner.config import DeploymentConfig, LimitsConfig
from runner.stack import open_limiters


def fleet(**limits: LimitsConfig) -> dict[str, DeploymentConfig]:
    models = {"east": "hosted_vllm/m", "west": "hosted_vllm/m", "north": "hosted_vllm/m"}
    return {label: DeploymentConfig(model=model, limits=limits.get(label)) for label, model in models.items()}


def test_the_limits_of_the_run_are_kept_by_all_deployments_together() -> None:
    limiters = open_limiters(fleet(), LimitsConfig(rpm=60))
    assert len(set(map(id, limiters.values()))) == 1


def test_a_deployment_with_limits_of_its_own_keeps_those() -> None:
    limiters = open_limiters(fleet(north=LimitsConfig(rpm=6)), LimitsConfig(rpm=60))
    assert limiters["east"] is limiters["west"]
    assert limiters["north"] is not limiters["east"]


def test_without_limits_a_pause_of_one_deployment_is_no_others() -> None:
    limiters = open_limiters(fleet(), LimitsConfig())
    limiters["east"].pause(60)
    assert limiters["east"].paused_s > 0
    assert limiters["west"].paused_s == 0
