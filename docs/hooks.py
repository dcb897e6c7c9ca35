"""Shows types and cross-references of docstrings, which are in HuggingFace's style, without their marks."""

import re


def on_page_content(html, **kwargs):
    html = re.sub(r"<code>([^<]*`[^<]*)</code>", lambda code: f"<code>{_plain(code[1])}</code>", html)
    return re.sub(r"\[(<code>)~?(?:\w+\.)*(\w+</code>)\]", r"\1\2", html)


def _plain(text):
    text = re.sub(r"\[`~?(?:\w+\.)*(\w+)`\]", r"\1", text)
    return text.replace("`", "").replace("*optional*", "optional")
