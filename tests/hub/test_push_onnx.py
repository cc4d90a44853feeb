"""What `sam-split export` wrote, on the Hub: graphs for transformers.js, or a static Space with the page."""

import json
import shutil
import sys

import onnx
import pytest
from huggingface_hub import ModelCard
from onnx import TensorProto, helper

from conversion import onnx_export
from conversion.onnx_page import export_page
from hub_card import onnx_folder
from hub_card.onnx_card import describe_page

GRAPHS, PAGE = "alice/sam-onnx", "alice/page"
SPACE = f"spaces/{PAGE}"
SHOWN = {"page.json", *(path.name for path in onnx_folder.PAGE.iterdir())}


@pytest.fixture(scope="module")
def exported(saved, tmp_path_factory):
    """An exported page whose graphs hold the digest of their weights and compute nothing."""

    def write(graph, path, *options):
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
        node = helper.make_node("Identity", ["x"], ["y"], doc_string=onnx_export._digest(graph.module))
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
        model = helper.make_model(helper.make_graph([node], graph.name, [x], [y]), ir_version=10)
        onnx.save(model, path)

    out = tmp_path_factory.mktemp("exported") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_export, "_write", write)
        patch.setattr(onnx_export, "compare", lambda *_: [])
        export_page(saved / "model", out, adapter=saved / "adapter", progress=False)
    return out


@pytest.fixture
def out(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "out")


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def readme(hub, repo_id):
    return ModelCard(hub.files(repo_id)["README.md"].decode())


def test_the_folder_says_how_to_serve_its_page(out):
    section = (out / "README.md").read_text().split("## The page")[1].split("## Use")[0]
    assert "python -m http.server" in section
    assert "`base/` holds" in section
    shutil.rmtree(out / "base")
    (out / "README.md").write_text("<!-- sam-split: use -->\n## Use\n")
    describe_page(out)
    section = (out / "README.md").read_text().split("## The page")[1].split("## Use")[0]
    assert "python -m http.server" in section
    assert "base/" not in section


def test_a_page_becomes_a_static_space_in_one_commit(hub, push, out):
    (out / ".env").write_text("SECRET=1")
    (out / "onnx" / "notes.txt").write_text("SECRET=1")
    said = push(out, PAGE, "--space", "--private").out
    space = hub.repositories[SPACE]
    assert (space.sdk, space.private) == ("static", True)
    assert [commit.title for commit in space.commits.values()] == ["initial commit", "Upload SamSplit page"]
    there, here = hub.files(SPACE), files(out)
    for path in (".env", "onnx/notes.txt"):
        del here[path]
    assert there.keys() == {*here, ".gitattributes", "style.css"}, "and what the Hub put there"
    assert [path for path in here if here[path] != there[path]] == ["README.md"]
    assert "Left out: .env, onnx/notes.txt" in said
    assert f"They load: {sum(path.endswith('.onnx') for path in here)} graphs" in said
    assert f"{hub.url}/{SPACE}/commit/{hub.head(SPACE)}" in said
    assert f"The page: {hub.url}/{SPACE}\n" in said
    card = readme(hub, SPACE)
    assert card.data.to_dict().items() >= {"title": "page", "sdk": "static", "app_file": "index.html"}.items()
    assert not {"library_name", "pipeline_tag"} & card.data.to_dict().keys()
    assert "python -m http.server" in card.text
    assert "SamModel.from_pretrained" not in card.text, "which loads models, not Spaces"


def test_the_card_of_a_space_names_the_base_as_a_model_that_it_uses(hub, push, out):
    text = (out / "README.md").read_text().replace("tags:", "license: apache-2.0\nbase_model: a/b\ntags:", 1)
    (out / "README.md").write_text(text)
    push(out, PAGE, "--space")
    data = readme(hub, SPACE).data
    assert (data.models, data.license, data.get("base_model")) == (["a/b"], "apache-2.0", None)


def test_without_space_it_is_a_model_of_transformers_js(hub, push, out):
    said = push(out, GRAPHS).out
    there, here = hub.files(GRAPHS), files(out)
    graphs = {path for path in here if path.startswith("onnx/")}
    assert (
        there.keys() == {"config.json", "preprocessor_config.json", "README.md", "LICENSE", ".gitattributes"} | graphs
    )
    assert all(there[path] == here[path] for path in graphs)
    assert f"Left out: {', '.join(sorted([*SHOWN, 'base/']))}" in said
    assert f'SamModel.from_pretrained("{GRAPHS}", {{ revision: "{hub.head(GRAPHS)}" }})' in said
    card = readme(hub, GRAPHS)
    assert card.data.library_name == "transformers.js"
    assert f'SamModel.from_pretrained("{GRAPHS}")' in card.text
    assert "your-name" not in card.text
    assert "index.html" not in card.text
    assert "base/" not in card.text


@pytest.mark.parametrize(("repo_id", "options"), [(GRAPHS, []), (PAGE, ["--space"])])
def test_a_second_run_has_nothing_to_do_and_stale_files_go(hub, push, out, repo_id, options):
    at = SPACE if options else repo_id
    push(out, repo_id, *options)
    hub.requests.clear()
    assert "Nothing to do" in push(out, repo_id, *options).out
    assert {seen.method for seen in hub.requests} == {"GET"}
    stale = {"onnx/vision_encoder_int8.onnx": b"0", "base/onnx/vision_encoder.onnx_data": b"0"}
    theirs = {"theirs.txt": b"1", "onnx/vision_encoder_q4.onnx": b"2"}
    hub.commit(at, {**theirs, **stale})
    before = hub.head(at)
    push(out, repo_id, *options)
    assert not stale.keys() & hub.files(at).keys()
    assert theirs.keys() <= hub.files(at).keys()
    assert hub.repositories[at].commits[hub.head(at)].parent == before


def test_a_dry_run_needs_no_token_and_makes_no_space(hub, push, out):
    assert "Dry run" in push(out, PAGE, "--space", "--dry-run", HF_TOKEN="").out
    assert {seen.method for seen in hub.requests} == {"GET"}


def test_a_push_to_a_space_in_between_is_not_overwritten(hub, push, out):
    def edit(serve):
        hub.commit(SPACE, {"index.html": b"theirs"})
        return serve()

    hub.on(f"POST /api/spaces/{PAGE}/commit/", edit)
    assert "Nothing was overwritten" in push(out, PAGE, "--space", code=1).err
    assert hub.files(SPACE)["index.html"] == b"theirs"


def test_what_a_space_stored_is_compared(hub, push, out):
    def corrupt(serve):
        answer = serve()
        hub.files(SPACE)["index.html"] = b"other"
        return answer

    hub.on(f"POST /api/spaces/{PAGE}/commit/", corrupt)
    assert "these files differ: index.html" in push(out, PAGE, "--space", code=1).err


def test_a_lost_answer_to_a_pull_request_to_a_space(hub, push, out):
    hub.create(SPACE, sdk="static")
    hub.on(f"POST /api/spaces/{PAGE}/commit/", lambda serve: serve() and None)
    said = push(out, PAGE, "--space", "--create-pr").out
    assert f"Pull request: {hub.url}/{SPACE}/discussions/1" in said
    assert hub.repositories[SPACE].pull_requests == {"refs/pr/1": "open"}


def test_without_onnxruntime_the_push_says_that_no_graph_was_loaded(hub, push, out, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    said = push(out, GRAPHS).out
    assert "Not loaded, because onnxruntime is not installed" in said
    assert "They load" not in said


def edit_json(path, **changes):
    return lambda out: (out / path).write_text(json.dumps({**json.loads((out / path).read_text()), **changes}))


def without(path):
    return lambda out: (out / path).unlink()


UNFIT = {
    "holds no page for a Space": (without("page.json"), "--space"),
    "page.js is missing": (without("page.js"), "--space"),
    "base/onnx/vision_encoder.onnx is missing": (without("base/onnx/vision_encoder.onnx"), "--space"),
    "base/../../secret is missing": (edit_json("page.json", base_files=["../../secret"]), "--space"),
    "onnx/mask_prompt_encoder.onnx is missing": (without("onnx/mask_prompt_encoder.onnx"),),
    "onnx/../secretNone.onnx is missing": (
        edit_json("config.json", **{"transformers.js_config": {"dtype": {"../secret": "?"}}}),
    ),
    "a graph is missing": (edit_json("config.json", **{"transformers.js_config": {}}),),
    "README.md is missing": (without("README.md"),),
    "must say model_type 'sam'": (edit_json("config.json", model_type="sam_split"),),
    "vision_encoder.onnx does not load": (lambda out: (out / "onnx/vision_encoder.onnx").write_bytes(b"\x08"),),
    "leave out --base-model and --demo": (lambda out: None, "--base-model", "a/b"),
    "README.md holds what looks like a Hugging Face token": (
        lambda out: (out / "README.md").write_text("hf_" + "AbCdEfGhIj" * 3),
    ),
}


@pytest.mark.parametrize("words", UNFIT)
def test_an_unfit_export_is_refused(hub, push, out, tmp_path, words):
    (tmp_path / "secret").write_text("")
    (out / "secretNone.onnx").write_text("")
    damage, *options = UNFIT[words]
    damage(out)
    assert words in push(out, PAGE, *options, code=2).err
    assert not hub.repositories


def test_neither_a_model_nor_an_adapter_becomes_a_space(hub, push, folder, adapter):
    for unfit in (folder, adapter):
        assert "`sam-split export MODEL OUT --page` writes" in push(unfit, PAGE, "--space", code=2).err
    assert not hub.repositories


@pytest.mark.parametrize("path", ["model.safetensors", "modeling_sam_split.py", "adapter_config.json"])
def test_graphs_do_not_go_on_top_of_a_model(hub, push, out, path):
    hub.create(GRAPHS, {path: b"{}"})
    assert f"holds {path} already" in push(out, GRAPHS, code=2).err
    assert "onnx/vision_encoder.onnx" not in hub.files(GRAPHS)


def test_a_model_does_not_go_on_top_of_graphs(hub, push, out, folder):
    push(out, GRAPHS)
    assert "holds onnx/mask_prompt_encoder.onnx already" in push(folder, GRAPHS, code=2).err


def test_a_space_of_another_kind_is_left_alone(hub, push, out):
    hub.create(SPACE, {"app.py": b"1"}, sdk="gradio")
    assert "is a Space made with gradio" in push(out, PAGE, "--space", code=2).err
    assert hub.files(SPACE).keys() == {".gitattributes", "app.py"}


# The link from a model's card


def test_a_models_card_links_to_its_page_until_the_weights_change(hub, push, folder, out):
    link = f"[{PAGE}](https://huggingface.co/spaces/{PAGE})"
    assert f"the Space {PAGE} is not on the Hub" in push(folder, "alice/sam", "--demo", PAGE, code=2).err
    push(out, PAGE, "--space")
    push(folder, "alice/sam", "--demo", PAGE)
    assert link in readme(hub, "alice/sam").text
    assert "Nothing to do" in push(folder, "alice/sam", "--demo", PAGE).out

    (folder / "README.md").write_bytes(hub.files("alice/sam")["README.md"])
    assert "Nothing to do" in push(folder, "alice/sam").out
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    push(folder, "alice/sam")
    assert link not in readme(hub, "alice/sam").text


def test_a_card_without_a_place_for_the_link_is_not_guessed_at(hub, push, folder):
    hub.create(SPACE, sdk="static")
    (folder / "README.md").write_text("# My nuclei\n")
    assert "write the link there yourself" in push(folder, "alice/sam", "--demo", PAGE, code=2).err
