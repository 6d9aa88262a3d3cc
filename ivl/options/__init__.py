"""Options, each declared once with its type, default and help: for the command line, configs and Python.

A class of options is a frozen dataclass; the text under a field is its help. What takes options as keywords names the
class, `def __init__(self, pretrained: str, **options)` with `DataOptions(**options)` in it, and the parser of the
command line (jsonargparse) finds the fields there. Nothing here imports torch, so that help and errors come at once.
"""

from __future__ import annotations

from ivl.options.commands import ChatSessionOptions as ChatSessionOptions
from ivl.options.commands import CheckOptions as CheckOptions
from ivl.options.commands import ExportOptions as ExportOptions
from ivl.options.commands import ModelsOptions as ModelsOptions
from ivl.options.commands import PairRule as PairRule
from ivl.options.commands import PairsOptions as PairsOptions
from ivl.options.commands import PlanOptions as PlanOptions
from ivl.options.commands import ReproduceOptions as ReproduceOptions
from ivl.options.commands import ScoreOptions as ScoreOptions
from ivl.options.data import DataOptions as DataOptions
from ivl.options.data import FileLimits as FileLimits
from ivl.options.data import ProcessorOptions as ProcessorOptions
from ivl.options.data import Source as Source
from ivl.options.generation import Batching as Batching
from ivl.options.generation import ChatOptions as ChatOptions
from ivl.options.generation import GenerationOptions as GenerationOptions
from ivl.options.generation import SamplingParams as SamplingParams
from ivl.options.media import FetchPolicy as FetchPolicy
from ivl.options.media import MediaPolicy as MediaPolicy
from ivl.options.media import Sampling as Sampling
from ivl.options.media import VideoOptions as VideoOptions
from ivl.options.model import AttentionKernel as AttentionKernel
from ivl.options.model import DType as DType
from ivl.options.model import Quantize as Quantize
from ivl.options.model import Reduction as Reduction
from ivl.options.tuning import Blocks as Blocks
from ivl.options.tuning import Checkpointing as Checkpointing
from ivl.options.tuning import LoRA as LoRA
from ivl.options.tuning import Rate as Rate
from ivl.options.tuning import Rates as Rates
from ivl.options.tuning import Tune as Tune
from ivl.options.tuning import VisionRate as VisionRate
