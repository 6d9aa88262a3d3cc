"""Learning rates, decay and schedule of a resumed run, by its present options.

torch and Lightning restore the values of the checkpoint. So each checkpoint also holds the settings of its run; where
the present ones differ, the restored values are replaced before they are loaded. Without a difference the run goes on
bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from ivl.types import UserError, first_few

Settings = dict[str, Any]

_COUNTERS = ("last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "base_lrs", "lr_lambdas")
_STATEFUL = ("amsgrad",)
"""Settings of a group that its states depend on"""
SAMPLES = 32
_REMEDY = {
    "model.optimizer": "correct its init_args, or take one that takes parameter groups, such as torch.optim.AdamW",
    "model.schedule": "take one that is made with (optimizer, number of steps), such as ivl.lit.schedule.Warmup",
}


def build(option: str, make: Callable[..., Any], *args: Any) -> Any:
    """Instantiate the class of an option. Raises UserError where its arguments do not fit or a package is missing."""
    try:
        instance = make(*args)
        if isinstance(instance, LambdaLR):
            instance.lr_lambdas[0](0)
        return instance
    except UserError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, ImportError, RuntimeError) as error:
        line = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{option}: its class cannot be used as given: {line}; {_REMEDY[option]}") from error


def check_schedule(schedule: Any) -> None:
    """Raise UserError for a schedule that depends on more than the number of the optimizer step."""
    if isinstance(schedule, ReduceLROnPlateau):
        raise UserError(
            "model.schedule: ReduceLROnPlateau follows a number that is measured, and schedules here follow the step; "
            "take ivl.lit.schedule.Warmup or another class that is made with (optimizer, number of steps)"
        )


def rate_settings(optimizer: Optimizer, schedule: Any, total_steps: int) -> Settings:
    """Return the settings of an optimizer and its schedule before the first step, as plain values."""
    groups = []
    for group in optimizer.param_groups:
        values = {k: v for k, v in group.items() if k != "params" and _is_plain(v)}
        values["lr"] = float(values.pop("initial_lr", group["lr"]))
        groups.append({"name": "all"} | values | {"tensors": len(group["params"])})
    arguments = {k: v for k, v in schedule.state_dict().items() if k not in _COUNTERS and _is_plain(v)}
    factors = None
    if isinstance(schedule, LambdaLR):
        points = [total_steps * n // SAMPLES for n in range(SAMPLES + 1)]
        factors = [[float(factor(point)) for point in points] for factor in schedule.lr_lambdas]
    name = f"{type(schedule).__module__}.{type(schedule).__qualname__}"
    return {
        "optimizer": type(optimizer).__name__,
        "groups": groups,
        "schedule": {"class": name, "given": arguments, "factors": factors, "total_steps": total_steps},
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, (str, int, float, bool, type(None)))


def apply_settings(checkpoint: dict[str, Any], now: Settings, schedule: LRScheduler) -> list[str]:
    """Put the present settings into a checkpoint's optimizer and schedule. Returns the differences, in words.

    `schedule`: a new one, at its first step. Raises UserError where the checkpoint's states do not fit the present
    settings.
    """
    before = checkpoint.get("rate_settings")
    if before is None or before == now:
        return []
    check_states(before, now)
    if "optimizer_states" not in checkpoint:
        raise UserError(
            f"--ckpt_path: {first_few(_changes(before, now), 3)}: this strategy restores the optimizer by itself, as "
            "the checkpoint has it; give what the run was given"
        )
    states = checkpoint["optimizer_states"][0].get("param_groups") or []
    position = checkpoint["lr_schedulers"][0]
    has_factors = isinstance(schedule, LambdaLR) and before["schedule"]["factors"] is not None
    if not has_factors and not _same_schedule(before, now):
        raise UserError(
            f"model.schedule: {_schedule_change(before, now)}; the checkpoint's is in the middle of its own. Give the "
            "one that the run was given, or ivl.lit.schedule.Warmup, which can be changed on the way"
        )
    step = position["last_epoch"]
    for number, (old, new) in enumerate(zip(before["groups"], now["groups"])):
        factor = schedule.lr_lambdas[number](step) if has_factors else None  # type: ignore[attr-defined]
        for state in states[number : number + 1]:
            state.update({k: v for k, v in new.items() if k not in ("lr", "tensors", "name")})
            if factor is not None:
                state["lr"] = new["lr"] * factor
            else:
                state["lr"] = state["lr"] * new["lr"] / old["lr"] if old["lr"] else new["lr"]
            state["initial_lr"] = new["lr"]
            position["_last_lr"][number] = state["lr"]
        position["base_lrs"][number] = new["lr"]
    return _changes(before, now)


def check_states(before: Settings, now: Settings) -> None:
    """Raise UserError where the states of the checkpoint's optimizer do not fit the present one."""
    if before["optimizer"] != now["optimizer"]:
        raise UserError(
            f"model.optimizer: the checkpoint holds states of {before['optimizer']}, found {now['optimizer']}; give "
            "what the run was given, or begin anew without --ckpt_path"
        )
    for key in ("name", "tensors", *_STATEFUL):
        old, new = ([group.get(key) for group in settings["groups"]] for settings in (before, now))
        if old != new:
            raise UserError(
                f"model.optimizer, model.rates: {key} of the checkpoint's groups: {first_few([*map(str, old)], 4)}; "
                f"found {first_few([*map(str, new)], 4)}; give what the run was given"
            )


def _same_schedule(before: Settings, now: Settings) -> bool:
    old, new = before["schedule"], now["schedule"]
    return all(old[key] == new[key] for key in ("class", "given", "factors"))


def _schedule_change(before: Settings, now: Settings) -> str:
    old, new = before["schedule"], now["schedule"]
    if old["class"] != new["class"]:
        return f"{old['class']} there, {new['class']} here"
    keys = [k for k in sorted({*old["given"], *new["given"]}) if old["given"].get(k) != new["given"].get(k)]
    return ", ".join(f"{k} {old['given'].get(k)!r} there, {new['given'].get(k)!r} here" for k in keys)


def _changes(before: Settings, now: Settings) -> list[str]:
    """Describe changes, such as `lr 0.001 → 1e-05`; groups with the same change share a line."""
    groups: dict[tuple[str, Any, Any], list[str]] = {}
    for old, new in zip(before["groups"], now["groups"]):
        for key in new:
            if old.get(key) != new[key]:
                groups.setdefault((key, str(old.get(key)), str(new[key])), []).append(new["name"])
    lines = []
    for (key, old, new), names in groups.items():
        where = "" if len(names) == len(now["groups"]) else f" of {first_few(names, 3)}"
        lines.append(f"{key}{where} {old} → {new}")
    if not _same_schedule(before, now) or before["schedule"]["total_steps"] != now["schedule"]["total_steps"]:
        steps = f"{before['schedule']['total_steps']} → {now['schedule']['total_steps']} steps"
        lines.append(f"schedule ({steps})")
    return lines
