"""What README shows works as it stands there."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_quick_start_lines():
    assert "\npip install -e . -c constraints.txt && python example.py\n" in README
    assert '\npip install -e ".[test]" -c constraints.txt && pytest\n' in README


def test_the_api_example_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert "Paris" in capsys.readouterr().out


def test_links_lead_somewhere():
    root = Path(__file__).parents[1]
    for page in (root / "README.md", *(root / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
