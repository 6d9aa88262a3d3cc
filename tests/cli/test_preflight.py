"""Mistakes in options are told at once, in our words."""

import pytest

from ivl.__main__ import main
from ivl.cli import preflight
from ivl.cli.option_index import option_index
from ivl.cli.other_trainers import CHECKPOINT_FACTS, NAMES, NEEDLESS, equivalent
from ivl.types import UserError

NEEDED = ["--model.pretrained", "x", "--data.train", "y"]


def refusal(command: str, *argv: str) -> str:
    with pytest.raises(UserError) as error:
        preflight.check(command, argv)
    return str(error.value)


@pytest.mark.parametrize(
    ("command", "argv", "message"),
    [
        ("fit", ["--data.train", "x"], "fit needs --model.pretrained: a folder or a name such as internvl2-2b"),
        ("fit", NEEDED[:2], "fit needs --data.train: a file of rows"),
        ("predict", [], "predict needs --model.pretrained: a folder or a name such as internvl2-2b, or --ckpt_path"),
        ("fit", ["--data.trian", "x"], "--data.trian: no such option of fit; did you mean --data.train?"),
        ("fit", ["--learning_rate", "1e-4"], "--learning_rate is --model.optimizer.lr here"),
        ("fit", ["--lora-rank=8"], "--lora-rank is --model.tune.language_model.rank here"),
        ("fit", ["--per_device_train_batch_size", "4"], "--per_device_train_batch_size is --data.batch_size here"),
        ("fit", ["--num_train_epochs", "1"], "--num_train_epochs is --trainer.max_epochs here"),
        ("fit", ["--max_dynamic_patch", "6"], "--max_dynamic_patch is --data.max_tiles here"),
        ("fit", ["--conv_style", "x"], "--conv_style is not needed here: it is read from the checkpoint"),
        ("fit", ["--overwrite_output_dir", "True"], "is not needed here: each run has a folder of its own"),
        ("fit", ["--rlhf_type", "dpo"], "--rlhf_type is --config tune/dpo or tune/mpo here"),
        ("fit", ["--do_train"], "--do_train is not needed here: the command says it: fit"),
        ("fit", ["--data", "rows.jsonl"], "--data rows.jsonl: --data.train takes files of rows"),
        ("fit", ["--data=rows.jsonl"], "--data rows.jsonl: --data.train takes files of rows"),
        ("fit", ["--model.pretrained"], "--model.pretrained: expected a value (str), found none"),
        ("fit", ["--data.packing", "--data.train", "y"], "--data.packing: expected a value (bool), found none"),
        ("fit", [*NEEDED, "--data.max_tiles", "six"], "--data.max_tiles: expected int, found 'six'"),
        ("fit", [*NEEDED, "--data.on_too_long=cut"], "expected fit or truncate_text or drop or error, found 'cut'"),
        ("fit", [*NEEDED, "--model.generation.top_p", "x"], "--model.generation.top_p: expected float, found 'x'"),
        ("fit", ["--model", "internvl2-2b"], "--model internvl2-2b: --model.pretrained takes a model's folder or name"),
        ("fit", ["--config", "nowhere.yaml"], "--config nowhere.yaml: cannot be read (No such file or directory)"),
        ("fit", ["--config", "{data: {max_tile: 3}}"], "data.max_tile: no such option; did you mean --data.max_tiles"),
    ],
)
def test_a_mistake_is_told_in_our_words(command, argv, message):
    assert message in refusal(command, *argv)


@pytest.mark.parametrize(
    "argv",
    [
        NEEDED,
        [*NEEDED, "--model.tune.language_model", "{rank: 4, alpha: 8}", "--model.tune.language_model.rank", "8"],
        [*NEEDED, "--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr", "1e-5"],
        [*NEEDED, "--trainer.logger.init_args.save_dir", "x", "--trainer.callbacks+=EarlyStopping"],
        [*NEEDED, "--data.train", "[a, b]", "--data.mixture", "[{path: a, ratio: 1}]", "--data.video", "{fps: 1}"],
        [*NEEDED, "--model.tune", "null", "--data.max_tiles", "null", "--trainer.max_steps=-1"],
        ["--config", "{model: {pretrained: x}, data: {train: a, video: {fps: 2}}, trainer: {max_epochs: 1}}"],
        ["--data.train", "x", "--print_config"],
        ["--ckpt_path", "runs/version_0/checkpoints/last.ckpt", "--data.train", "x"],
    ],
)
def test_what_the_parser_takes_is_let_through(argv):
    preflight.check("fit", argv)


def test_a_config_that_is_no_config_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("- a\n- b\n")
    assert "expected options by section, found list" in refusal("fit", "--config", str(tmp_path / "a.yaml"))
    (tmp_path / "a.yaml").write_text("model: {pretrained: x\n")
    assert "a.yaml: not YAML (" in refusal("fit", f"--config={tmp_path / 'a.yaml'}")


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_another_trainer_has_an_option_here(name):
    option = NAMES[name].split()[0].rstrip(",").removeprefix("--").rstrip(":")
    assert preflight.is_known(option), f"{name} -> {option}"
    if name != "model":  # a group of fit's, and of no other command
        assert not preflight.is_known(name), "an option of ours needs no answer"
    assert equivalent(name.replace("_", "-")) == f"{NAMES[name]} here"
    assert name not in CHECKPOINT_FACTS


@pytest.mark.parametrize("name", NEEDLESS)
def test_every_needless_option_of_another_trainer_has_a_reason(name):
    assert refusal("fit", f"--{name}", "true") == f"--{name} is not needed here: {NEEDLESS[name]}"
    assert name not in NAMES and not preflight.is_known(name)


def test_other_options_of_a_command_are_let_through():
    preflight.check("plan", [*NEEDED, "--device", "H100-80GB"], further=("device",))
    assert "--device: no such option of fit" in refusal("fit", *NEEDED, "--device", "H100-80GB")


def test_the_index_is_not_empty():
    assert len(option_index()) > 150


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["check", "--data.trian", "x"], "--data.trian: no such option of check; did you mean --data.train?"),
        (
            ["chat", "--model", "x", "--temprature", "1"],
            "--temprature: no such option of chat; did you mean --temperature?",
        ),
        (["export", "--run", "x", "--outt", "y"], "--outt: no such option of export; did you mean --out?"),
    ],
)
def test_other_commands_name_the_closest_option_too(capsys, argv, message):
    assert main(argv) == 2
    assert f"error: {message}" in capsys.readouterr().err
