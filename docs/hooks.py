"""What `mkdocs build` does beside its configuration: pages from outside `docs`, and two checks that end the build."""

import re
from pathlib import Path

import griffe
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).parents[1]
STOCK = ("get_input_embeddings", "gradient_checkpointing_enable")  # overridden; transformers documents them
OUTSIDE = ("benchmarks/results", "examples/results", "CHANGELOG.md", "CONTRIBUTING.md")


class Doctests(griffe.Extension):
    """Doctests, which Markdown would take for quotations, as blocks of code."""

    def on_object(self, *, obj, **_):
        if obj.docstring:
            obj.docstring.value = re.sub(r"^>>> (?:.+\n?)+", _fenced, obj.docstring.value, flags=re.MULTILINE)


def _fenced(doctest):
    return f"```pycon\n{doctest[0].rstrip()}\n```\n"


def on_files(files, config):
    """Add the reports, which stand beside what writes them, under the address that links have in the repository."""
    for place in OUTSIDE:
        folder = ROOT / place
        for path in sorted(folder.glob("*.*")) if folder.is_dir() else [folder]:
            if path.suffix in (".md", ".png", ".jpg", ".svg"):
                name = path.relative_to(ROOT).as_posix()
                file = File.generated(config, f"../{name}", abs_src_path=str(path), inclusion=InclusionLevel.INCLUDED)
                file.dest_uri = file.dest_uri.removeprefix("../")
                files.append(file)
    return files


def on_page_markdown(markdown, page, **_):
    """No name of the reference, and no public method of one, is without a docstring."""
    names = re.findall(r"^::: (\S+)", markdown, re.MULTILINE)
    packages = {name: griffe.load(name, search_paths=[ROOT]) for name in {name.split(".")[0] for name in names}}
    for name in names:
        package, _, path = name.partition(".")
        found = packages[package][path]
        methods = found.functions.values() if found.is_class else ()
        for one in [found, *(method for method in methods if method.name[0] != "_" and method.name not in STOCK)]:
            if not one.has_docstring and not one.is_attribute:
                raise PluginError(f"{page.file.src_uri}: {one.path} has no docstring")


def on_post_page(output, page, **_):
    """No page loads anything from another host; and the theme's search has a name for screen readers."""
    loaded = re.findall(
        r'<(?:script|img|iframe)[^>]*\bsrc="(?:https?:)?//[^"]*|<link[^>]*href="(?:https?:)?//[^"]*', output
    )
    if loaded:
        raise PluginError(f"{page.file.src_uri} loads {loaded}")
    return output.replace('role="dialog"', 'role="dialog" aria-label="Search"')
