"""The U of a network as a picture: what `tools.cost.account --tree` draws, as an SVG that any browser shows.

python -m tools.cost.tree                       writes tools/results/tree.svg, the released network's
"""

import argparse
from html import escape
from pathlib import Path

from minisvd.config import PRESETS, UNetConfig, VAEConfig
from tools.cost.accounting import tree, unet_blocks
from tools.output import atomic

LINE, ADVANCE, MARGIN = 17, 7.83, 14  # pixels: from line to line, from letter to letter, around it all
STYLE = """text { font: 13px "DejaVu Sans Mono", Menlo, Consolas, monospace; fill: #1f2328; white-space: pre }
rect { fill: #ffffff }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } rect { fill: #0d1117 } }"""


def svg(lines: list[str], title: str) -> str:
    """Lines of type on a ground, light or dark as the reader's; each is held to its width, so that columns meet."""
    width, height = 2 * MARGIN + max(map(len, lines)) * ADVANCE, 2 * MARGIN + len(lines) * LINE
    texts = [
        f'<text x="{MARGIN}" y="{MARGIN + LINE * (i + 0.75):.1f}" textLength="{ADVANCE * len(line):.1f}" '
        f'lengthAdjust="spacingAndGlyphs" xml:space="preserve">{escape(line)}</text>'
        for i, line in enumerate(lines)
    ]
    size = f'width="{width:.0f}" height="{height}" viewBox="0 0 {width:.0f} {height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"><title>{escape(title)}</title>'
    return "\n".join([head, f"<style>{STYLE}</style>", '<rect width="100%" height="100%"/>', *texts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description="The U of the released network as a picture.")
    parser.add_argument("--model", choices=PRESETS, default="svd-xt", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("tools/results/tree.svg"))
    args = parser.parse_args()
    generation, factor = PRESETS[args.model].generation, VAEConfig().factor
    (w, h), t = generation.size, generation.num_frames
    lines = tree(unet_blocks(UNetConfig(), t, (w // factor, h // factor))).splitlines()
    with atomic(args.out) as path:
        path.write_text(svg([line.rstrip() for line in lines], f"The U of {args.model}, {t} frames of {w}x{h}, guided"))
    print(args.out)


if __name__ == "__main__":
    main()
