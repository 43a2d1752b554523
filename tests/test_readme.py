"""What README shows works as it stands there."""

import re
import shlex
from pathlib import Path

import bench

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_quick_start_lines():
    assert "\npip install -e . -c constraints.txt && python example.py\n" in README
    assert '\npip install -e ".[test]" -c constraints.txt && pytest\n' in README


def test_the_api_example_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert "Paris" in capsys.readouterr().out


def test_bench_commands_parse_and_name_an_interpreter_for_each_peer(monkeypatch):
    """The command of the table named peers alone, which are not where nanovllm is."""
    commands = re.findall(r"python (bench\.py (?:[^`\n\\]|\\\n)*)", README)
    assert len(commands) == README.count("bench.py")
    for command in commands:
        monkeypatch.setattr("sys.argv", shlex.split(command.replace("\\\n", "")))
        args = bench.parse_args()
        peers = {name for name in args.engine if not name.startswith("nanovllm")}
        assert peers == {given.partition("=")[0] for given in args.python}, command


def test_links_lead_somewhere():
    root = Path(__file__).parents[1]
    for page in (root / "README.md", *(root / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
