"""
Shows types and cross-references of docstrings, which are in HuggingFace's style, as links and without their marks.
"""

import re


def on_page_content(html, **kwargs):
    anchors = {name.rpartition(".")[2]: name for name in re.findall(r'id="(trl_learnalign\.[\w.]+)"', html)}

    def linked(name):
        name = name.rpartition(".")[2]
        return f'<a href="#{anchors[name]}">{name}</a>' if name in anchors else name

    def type_of(code):  # `int`, *optional*, defaults to `3`: the default has a column of its own
        words = re.sub(r",? *\*optional\*.*", "", code[1]) or code[1]
        words = re.sub(r"\[`~?([\w.]+)`\]", lambda name: linked(name[1]), words)
        return f"<code>{words.replace('`', '')}</code>"

    html = re.sub(r"<code>([^<]*`[^<]*)</code>", type_of, html)
    return re.sub(r"\[<code>~?([\w.]+)</code>\]", lambda name: f"<code>{linked(name[1])}</code>", html)
