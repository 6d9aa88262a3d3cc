"""Learning rates, decay and schedule of a resumed run: as its options say now, whatever its checkpoint was made with.

torch and Lightning restore them from the checkpoint. So each checkpoint also says what its run was given; where that
differs from what is given now, the restored values are replaced before they are loaded. Where nothing differs nothing
is touched, and the run goes on bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from ivl.types import UserError, some

Settings = dict[str, Any]

_COUNTERS = ("last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "base_lrs", "lr_lambdas")
_STATEFUL = ("amsgrad",)
"""Settings of a group that decide which states it has"""
SAMPLES = 32
_REMEDY = {
    "model.optimizer": "correct its init_args, or take one that takes parameter groups, such as torch.optim.AdamW",
    "model.schedule": "take one that is made with (optimizer, number of steps), such as ivl.lit.schedule.Warmup",
}


def fitting(option: str, make: Callable[..., Any], *given: Any) -> Any:
    """What an option's class makes. Raises UserError where its arguments do not fit, or it needs what is not there."""
    try:
        made = make(*given)
        if isinstance(made, LambdaLR):
            made.lr_lambdas[0](0)
        return made
    except UserError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, ImportError, RuntimeError) as error:
        line = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{option}: its class cannot be used as given: {line}; {_REMEDY[option]}") from error


def check_schedule(schedule: Any) -> None:
    """Raise UserError for a schedule that cannot be stepped once per optimizer step by the step's number alone."""
    if isinstance(schedule, ReduceLROnPlateau):
        raise UserError(
            "model.schedule: ReduceLROnPlateau follows a number that is measured, and schedules here follow the step; "
            "take ivl.lit.schedule.Warmup or another class that is made with (optimizer, number of steps)"
        )


def rate_settings(optimizer: Optimizer, schedule: Any, total_steps: int) -> Settings:
    """What an optimizer and its schedule are given, as plain values, before the first step."""
    groups = []
    for group in optimizer.param_groups:
        values = {k: v for k, v in group.items() if k != "params" and _is_plain(v)}
        values["lr"] = float(values.pop("initial_lr", group["lr"]))
        groups.append({"name": "all"} | values | {"tensors": len(group["params"])})
    given = {k: v for k, v in schedule.state_dict().items() if k not in _COUNTERS and _is_plain(v)}
    factors = None
    if isinstance(schedule, LambdaLR):
        points = [total_steps * n // SAMPLES for n in range(SAMPLES + 1)]
        factors = [[float(factor(point)) for point in points] for factor in schedule.lr_lambdas]
    name = f"{type(schedule).__module__}.{type(schedule).__qualname__}"
    return {
        "optimizer": type(optimizer).__name__,
        "groups": groups,
        "schedule": {"class": name, "given": given, "factors": factors, "total_steps": total_steps},
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, (str, int, float, bool, type(None)))


def take_typed(checkpoint: dict[str, Any], now: Settings, schedule: LRScheduler) -> list[str]:
    """Put what is given now into a checkpoint's optimizer and schedule. Returns what differs, in words.

    `schedule`: a new one, at its beginning. Raises UserError where the checkpoint's states mean nothing under what is
    given now.
    """
    before = checkpoint.get("rate_settings")
    if before is None or before == now:
        return []
    check_states(before, now)
    if "optimizer_states" not in checkpoint:
        raise UserError(
            f"--ckpt_path: {some(_changes(before, now), 3)}: this strategy restores the optimizer by itself, as the "
            "checkpoint has it; give what the run was given"
        )
    states = checkpoint["optimizer_states"][0].get("param_groups") or []
    position = checkpoint["lr_schedulers"][0]
    follows = isinstance(schedule, LambdaLR) and before["schedule"]["factors"] is not None
    if not follows and not _same_schedule(before, now):
        raise UserError(
            f"model.schedule: {_schedule_change(before, now)}; the checkpoint's is in the middle of its own. Give the "
            "one that the run was given, or ivl.lit.schedule.Warmup, which can be changed on the way"
        )
    step = position["last_epoch"]
    for number, (old, new) in enumerate(zip(before["groups"], now["groups"])):
        factor = schedule.lr_lambdas[number](step) if follows else None  # type: ignore[attr-defined]
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
    """Raise UserError where an optimizer's states do not fit the one that is given now."""
    if before["optimizer"] != now["optimizer"]:
        raise UserError(
            f"model.optimizer: the checkpoint holds states of {before['optimizer']}, found {now['optimizer']}; give "
            "what the run was given, or begin anew without --ckpt_path"
        )
    for key in ("name", "tensors", *_STATEFUL):
        old, new = ([group.get(key) for group in settings["groups"]] for settings in (before, now))
        if old != new:
            raise UserError(
                f"model.optimizer, model.rates: {key} of the checkpoint's groups: {some([*map(str, old)], 4)}; found "
                f"{some([*map(str, new)], 4)}; give what the run was given"
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
    """`lr 0.001 → 1e-05`: for all groups at once where they agree."""
    found: dict[tuple[str, Any, Any], list[str]] = {}
    for old, new in zip(before["groups"], now["groups"]):
        for key in new:
            if old.get(key) != new[key]:
                found.setdefault((key, str(old.get(key)), str(new[key])), []).append(new["name"])
    lines = []
    for (key, old, new), names in found.items():
        where = "" if len(names) == len(now["groups"]) else f" of {some(names, 3)}"
        lines.append(f"{key}{where} {old} → {new}")
    if not _same_schedule(before, now) or before["schedule"]["total_steps"] != now["schedule"]["total_steps"]:
        steps = f"{before['schedule']['total_steps']} → {now['schedule']['total_steps']} steps"
        lines.append(f"schedule ({steps})")
    return lines
