"""What models of the V1.5 line take is known from a checkpoint's files, whatever its folder is called."""

import pytest
from PIL import Image

from ivl.architecture.families import INTERNLM_SYSTEM, PHI3_SYSTEM
from ivl.commands.export import export
from ivl.data.processor import Processor
from ivl.types import UserError
from tests.tiny import write_checkpoint

V1_5 = {"transformers_version": None, "pad2square": False}
"""As the line's config.json has them; those of InternVL2 do not"""


def limited(folder, video=None) -> bool:
    """Whether images in several turns and videos are refused."""
    processor = Processor.from_pretrained(folder)
    image = Image.new("RGB", (8, 8))
    rows = (
        {"query": "<image>", "history": [["<image>", "A"]], "images": [image, image]},
        {"query": "Q", "videos": [[image]]},
    )
    refused = 0
    for row, message in zip(rows, ("takes images in one turn only, found them in 2", "takes no video")):
        try:
            processor(row)
        except UserError as error:
            assert message in str(error)
            refused += 1
    assert refused in (0, 2)
    return refused == 2


@pytest.mark.parametrize(
    ("architecture", "message"),
    [("InternLM2ForCausalLM", INTERNLM_SYSTEM), ("Phi3ForCausalLM", PHI3_SYSTEM)],
)
def test_by_the_config_or_the_conversation_file(tmp_path, architecture, message):
    folder = write_checkpoint(tmp_path / "by-config", architecture, overrides=V1_5)
    assert limited(folder)
    assert limited(write_checkpoint(tmp_path / "by-message", architecture, overrides={"system_message": message}))
    other = write_checkpoint(tmp_path / "by-file", architecture)
    assert not limited(other)
    name = Processor.from_pretrained(other).template.name
    (other / "conversation.py").write_text(f"Conversation(name={name!r}, system_message={message!r})\n")
    assert limited(other)
    (folder / "conversation.py").write_text(f"Conversation(name={name!r}, system_message='of InternVL2')\n")
    assert not limited(folder)


@pytest.mark.parametrize("layout", ["released", "hf"])
def test_an_export_obeys_too(tmp_path, layout):
    base = write_checkpoint(tmp_path / "base", "InternLM2ForCausalLM", overrides=V1_5)
    assert limited(export(str(tmp_path / "out"), base=str(base), layout=layout))
    later = write_checkpoint(tmp_path / "later", "InternLM2ForCausalLM")
    assert not limited(export(str(tmp_path / "out2"), base=str(later), layout=layout))


def test_other_lines_take_all(tmp_path):
    assert not limited(write_checkpoint(tmp_path / "base", "Qwen3ForCausalLM", overrides=V1_5))


def test_the_recorded_checkpoint(golden):
    assert limited(golden / "checkpoints/internvl_chat_v1_5")
    assert not limited(golden / "checkpoints/internvl2_26b")
