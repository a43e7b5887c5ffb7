"""What the VCUT paper prints, and where our measures stand beside it.

Source: arXiv 2407.19205, Tables I and IV: 25 steps, guidance 1 to 3, 5,590 videos of VBench's image suite, percentages.
Its aesthetics (LAION's predictor) and imaging quality (MUSIQ) need networks that judge photographs; they have no column
here. Its smoothness and dynamic degree are by AMT and RAFT, ours by a Lucas-Kanade flow; its features by DINO and CLIP,
ours by the encoders that the study was run with. So columns are compared in their direction, not in their height.
"""

from dataclasses import dataclass

COLUMNS = {  # the paper's column: the key of our measure
    "subject consistency (Eq. 5)": "subject_consistency",
    "background consistency (Eq. 7)": "background_consistency",
    "motion smoothness": "smoothness",
    "dynamic degree": "moving",
    "video-image subject (Eq. 6)": "image_subject_consistency",
    "video-image background (Eq. 8)": "image_background_consistency",
}


@dataclass(frozen=True)
class PaperRow:
    """A row of the tables for SVD and SVD-XT, under COLUMNS, and seconds on an A10 where they are given; `arm` is the
    name of ours, in the families of the paper's guidance."""

    title: str
    arm: str
    svd: tuple[float, ...]
    xt: tuple[float, ...]
    svd_seconds: float | None = None
    xt_seconds: float | None = None


ROWS = (
    PaperRow("as released", "lossless guidance 1 3", (96.70, 96.83, 97.97, 43.17, 97.42, 97.68),
             (95.52, 96.61, 98.09, 52.36, 97.52, 97.63), 68.4, 120.6),
    PaperRow("TCA omitted, SCA linear", "True guidance 1 3", (96.69, 96.81, 97.96, 45.44, 97.40, 97.67),
             (95.60, 96.46, 98.03, 58.20, 97.21, 97.62)),
    PaperRow("c = 10", "True c=10 mean guidance 1 3", (91.85, 91.23, 94.07, 43.20, 91.09, 91.88),
             (91.11, 90.02, 94.81, 54.27, 91.86, 92.19), 47.1, 84.3),
    PaperRow("c = 17", "True c=17 mean guidance 1 3", (96.69, 96.88, 98.04, 45.77, 97.32, 97.49),
             (95.48, 96.49, 98.04, 57.80, 97.25, 97.52), 54.7, 97.3),
    PaperRow("c = 20", "True c=20 mean guidance 1 3", (96.70, 96.91, 97.92, 44.05, 97.42, 97.60),
             (95.54, 96.53, 98.03, 58.69, 97.42, 97.61), 58.2, 103.2),
)  # fmt: skip
