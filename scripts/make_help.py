#!/usr/bin/env python3
"""Help pages in the other languages, from locales/: web/docs/NODE/LANGUAGE.md. The English ones, web/docs/NODE.md, are
written by hand.

  python scripts/make_help.py             write them
  python scripts/make_help.py --check     write nothing; status 1 when one is not what it would be

Run it after scripts/make_locales.py. A page is the node's description, which choice to take, the picture of the
English page, and a paragraph for each input and output: ComfyUI's side panel is too narrow for tables. What only the
English page has (limits, related nodes) stays English there. Standard library alone.
"""

import argparse
import re
import sys

from make_locales import FOLDER, LANGUAGES, NODES, ROOT, read

PAGES = ROOT / "web" / "docs"
HEADINGS = {  # which one, inputs, outputs, and where the whole page is
    "zh": ("选哪一个？", "输入", "输出", "限制和相关节点见英文页面。"),
    "ja": ("どれを選ぶ？", "入力", "出力", "制限と関連ノードは英語のページにあります。"),
    "ko": ("무엇을 고를까요?", "입력", "출력", "제한과 관련 노드는 영어 페이지에 있습니다."),
    "fr": ("Lequel choisir ?", "Entrées", "Sorties", "Limites et nœuds voisins : voir la page en anglais."),
    "es": ("¿Cuál elegir?", "Entradas", "Salidas", "Límites y nodos relacionados: véase la página en inglés."),
    "ru": ("Что выбрать?", "Входы", "Выходы", "Ограничения и связанные узлы: см. страницу на английском."),
}
PICTURE = re.compile(r"!\[[^\]]*\]\([^)]+\)")
CHOICES = {"Flux2SelectAttention": "backend"}  # the input whose tooltip says, line by line, which one to take


def page(name, texts, language):
    """The help page of a node as Markdown. texts: its entry in nodeDefs.json of that language."""
    which, inputs, outputs, more = HEADINGS[language]
    parts = [f"# {texts['display_name']}", texts["description"]]
    if name in CHOICES:
        first, *choices = texts["inputs"][CHOICES[name]]["tooltip"].split("\n")
        parts = [parts[0], f"## {which}", "\n".join(f"- {choice}" for choice in choices), first, *parts[1:]]
    parts += PICTURE.findall((PAGES / f"{name}.md").read_text(encoding="utf-8"))
    parts += [f"## {inputs}"] * bool(texts["inputs"])
    parts += [paragraph(entry["name"], entry["tooltip"]) for entry in texts["inputs"].values()]
    parts += [f"## {outputs}"] * bool(texts["outputs"])
    parts += [paragraph(entry.get("name", ""), entry["tooltip"]) for entry in texts["outputs"].values()]
    return "\n\n".join([*parts, more]) + "\n"


def paragraph(name, text):
    """Lines of a tooltip stay lines."""
    return (f"**{name}** – " if name else "") + text.replace("\n", "  \n")


def pages():
    """{path: Markdown} of all pages that are made here."""
    return {
        PAGES / name / f"{language}.md": page(name, texts, language)
        for language in LANGUAGES
        for name, texts in read(FOLDER / language / NODES).items()
    }


def main():
    parser = argparse.ArgumentParser(prog="make_help", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check, wanted = parser.parse_args().check, pages()
    stale = [path for path in PAGES.glob("*/*.md") if path not in wanted]
    changed = [path for path, text in wanted.items() if not path.is_file() or path.read_text("utf-8") != text]
    for path in stale + changed:
        print(path.relative_to(ROOT))
    if check:
        sys.exit(bool(stale or changed))
    for path in stale:
        path.unlink()
    for path in changed:
        path.parent.mkdir(exist_ok=True)
        path.write_text(wanted[path], encoding="utf-8")


if __name__ == "__main__":
    main()
