"""How the figures of tools.explore and of the recipes look, and where they are written."""

from pathlib import Path

from common.errors import UserError
from common.files import renamed_when_whole

# Okabe and Ito's palette, which colour-blind readers can tell apart; different dashes, for print.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999"]
DASHES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 2))]
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.hashsalt": "tools.explore",
    "savefig.bbox": "tight",
}


def plotting():
    """matplotlib's pyplot, drawing into files only. Raises UserError where it is missing."""
    try:
        import matplotlib
    except ImportError:
        raise UserError(
            "figures need matplotlib: pip install matplotlib (or -r requirements-dev.txt)"
        ) from None
    matplotlib.use("Agg")
    matplotlib.rcParams.update(STYLE)
    from matplotlib import pyplot

    return pyplot


def save_figure(figure, out, description=None, suffixes=(".png", ".svg")):
    """Write `out`.png and `out`.svg, which holds the description; print their names."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    for suffix in suffixes:
        path = out.with_name(out.name + suffix)
        # Without a date the same figure is the same file.
        metadata = {"Date": None, "Description": description} if suffix == ".svg" else None
        with renamed_when_whole(path) as temporary:
            figure.savefig(temporary, dpi=130, metadata=metadata, format=suffix[1:])
        print(path)
