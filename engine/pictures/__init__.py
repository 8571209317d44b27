"""The pictures of a run, each a function that returns a matplotlib figure, and what makes files and pages of them.

They are made without pyplot: no display, no global state.
"""

from engine.pictures.class_balance import draw_class_balance
from engine.pictures.class_figures import draw_class_figures
from engine.pictures.confusion import draw_confusion_matrix
from engine.pictures.curves import draw_curves
from engine.pictures.mistakes import Example, draw_evidence, draw_mistakes, typical_hits, worst_mistakes
from engine.pictures.output import alt_text, image_to_jpeg, to_jpeg, to_png, to_svg
from engine.pictures.precision_recall import draw_precision_recall
from engine.pictures.reliability import draw_reliability
from engine.pictures.roc import draw_roc

__all__ = [
    "Example",
    "alt_text",
    "draw_class_balance",
    "draw_class_figures",
    "draw_confusion_matrix",
    "draw_curves",
    "draw_evidence",
    "draw_mistakes",
    "draw_precision_recall",
    "draw_reliability",
    "draw_roc",
    "image_to_jpeg",
    "to_jpeg",
    "to_png",
    "to_svg",
    "typical_hits",
    "worst_mistakes",
]
