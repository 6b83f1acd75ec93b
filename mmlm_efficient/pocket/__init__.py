"""The embedded default model: a real, small LLaVA, its scenes, its questions, its training."""

from __future__ import annotations

from mmlm_efficient.pocket.objects import NAMES
from mmlm_efficient.pocket.questions import KINDS, Question, is_right, questions, video_questions
from mmlm_efficient.pocket.scenes import Scene, SceneObject, VideoScene, scene, video

__all__ = [
    "KINDS",
    "NAMES",
    "Question",
    "Scene",
    "SceneObject",
    "VideoScene",
    "is_right",
    "questions",
    "scene",
    "video",
    "video_questions",
]
