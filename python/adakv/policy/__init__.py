"""Policies: which entries of a prompt stay in the cache.

A policy is a scorer, an allocator and a selector; :func:`get` knows those that have a name.
"""

from adakv.policy.allocators import (
    Adaptive,
    Capped,
    Everything,
    Flat,
    ModelWide,
    Pyramid,
    Uniform,
)
from adakv.policy.base import (
    Allocator,
    EveryTokens,
    Kept,
    LayerBudget,
    LayerInputs,
    LayerSchedule,
    Need,
    PartwiseScorer,
    Policy,
    Scorer,
    Selector,
    TopScore,
)
from adakv.policy.beside import SmallKV, SpecAttn
from adakv.policy.budget import Budget, ByteBudget
from adakv.policy.class_scorers import ClassAttention, ClassQuotas, DualThreshold, EliteQueries
from adakv.policy.folded import Folded
from adakv.policy.fusion import RankFusion
from adakv.policy.gates import Gate
from adakv.policy.layer_shares import LayerEntropy, StrengthSkew
from adakv.policy.learned import LearnedScorer
from adakv.policy.mass_share import MassShare
from adakv.policy.more_tokens import MoreTokens
from adakv.policy.outliers import HiddenOutlier
from adakv.policy.predictor import AttentionPredictor
from adakv.policy.presets import DEFAULT, get, get_read, names
from adakv.policy.press import PressScorer
from adakv.policy.profile import Profile
from adakv.policy.prompt_scorers import (
    ColumnMax,
    ExpectedAttention,
    PromptAttention,
    RepeatAttention,
)
from adakv.policy.protection import Protection, spans_of
from adakv.policy.reads import PageRead, Quest, Read
from adakv.policy.scorers import (
    Defensive,
    KeyDiff,
    KeyNorm,
    LargestValue,
    LastQuery,
    Random,
    Recency,
    WindowAttention,
)
from adakv.policy.selectors import TwoStage
from adakv.policy.text_scorers import (
    RKV,
    AhaKV,
    Earliest,
    LastImportant,
    SampledRest,
    ValueRange,
)
from adakv.policy.token_classes import TokenClasses
from adakv.policy.whole_pages import WholePages

__all__ = [
    "DEFAULT",
    "RKV",
    "Adaptive",
    "AhaKV",
    "Allocator",
    "AttentionPredictor",
    "Budget",
    "ByteBudget",
    "Capped",
    "ClassAttention",
    "ClassQuotas",
    "ColumnMax",
    "Defensive",
    "DualThreshold",
    "Earliest",
    "EliteQueries",
    "EveryTokens",
    "Everything",
    "ExpectedAttention",
    "Flat",
    "Folded",
    "Gate",
    "HiddenOutlier",
    "Kept",
    "KeyDiff",
    "KeyNorm",
    "LargestValue",
    "LastImportant",
    "LastQuery",
    "LayerBudget",
    "LayerEntropy",
    "LayerInputs",
    "LayerSchedule",
    "LearnedScorer",
    "MassShare",
    "ModelWide",
    "MoreTokens",
    "Need",
    "PageRead",
    "PartwiseScorer",
    "Policy",
    "PressScorer",
    "Profile",
    "PromptAttention",
    "Protection",
    "Pyramid",
    "Quest",
    "Random",
    "RankFusion",
    "Read",
    "Recency",
    "RepeatAttention",
    "SampledRest",
    "Scorer",
    "Selector",
    "SmallKV",
    "SpecAttn",
    "StrengthSkew",
    "TokenClasses",
    "TopScore",
    "TwoStage",
    "Uniform",
    "ValueRange",
    "WholePages",
    "WindowAttention",
    "get",
    "get_read",
    "names",
    "spans_of",
]
