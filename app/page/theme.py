"""How the page looks: Gradio's theme in our colours, the page's own style, and its small script."""

from pathlib import Path

import gradio as gr

from visualizations.assets import css as views_css

_FOLDER = Path(__file__).parent
TEAL = gr.themes.Color(
    "#eef7f7", "#e6f2f2", "#c5e2e3", "#9accce", "#5fa9ad", "#0b6e75",
    "#0a636a", "#08545a", "#07464b", "#06393d", "#042b2e",
)  # fmt: skip


def theme() -> gr.themes.Base:
    fonts = ["Inter", "DejaVu Sans", "system-ui", "sans-serif"]
    made = gr.themes.Base(
        primary_hue=TEAL,
        neutral_hue=gr.themes.colors.stone,
        font=fonts,
        font_mono=["ui-monospace", "DejaVu Sans Mono", "monospace"],
        radius_size=gr.themes.sizes.radius_md,
    )
    return made.set(
        body_background_fill="#f7f7f5",
        body_background_fill_dark="#141619",
        background_fill_secondary="#f6f6f3",
        background_fill_secondary_dark="#24272c",
        block_border_width="0px",
        block_shadow="none",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        border_color_primary="#e4e4e0",
        border_color_primary_dark="#35393f",
        button_primary_background_fill="#0b6e75",
        button_primary_background_fill_hover="#08545a",
        button_primary_background_fill_dark="#0b6e75",
        button_primary_text_color="#ffffff",
        slider_color="#0b6e75",
        slider_color_dark="#5bbcc2",
    )


def css() -> str:
    return views_css() + (_FOLDER / "page.css").read_text(encoding="utf-8")


def head() -> str:
    return f"<script>{(_FOLDER / 'page.js').read_text(encoding='utf-8')}</script>"
