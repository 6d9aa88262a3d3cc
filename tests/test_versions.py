"""The table of versions: counts of a report, and rows put in their places."""

from tests.versions import COLUMNS, PAGE, counts, with_row

REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="one"/>
<testcase classname="tests.test_a" name="two"><failure message="x"/></testcase>
<testcase classname="tests.test_a" name="three"><skipped message="no GPU"/></testcase>
<testcase classname="tests.test_a" name="four"><error message="x"/></testcase>
</testsuite></testsuites>"""


def test_a_report_is_counted():
    assert counts(REPORT) == ({"passed": 1, "failed": 2, "skipped": 1}, ["tests.test_a::two", "tests.test_a::four"])


def test_a_row_takes_the_place_of_that_of_the_same_set_python_and_tests():
    page = PAGE.read_text(encoding="utf-8")
    row = dict(zip(COLUMNS, ("new", "3.12.1", "torch 9", "all default", "1", "2", "3", "2026-01-01"), strict=True))
    once = with_row(page, row)
    assert len(once.splitlines()) == len(page.splitlines()) + 1
    assert once.count("| new | 3.12.1 |") == 1 and "| 3 | 2026-01-01 |\n\nSkipped" in once
    again = with_row(once, row | {"Python": "3.12.4", "passed": "7"})
    assert len(again.splitlines()) == len(once.splitlines()) and "| new | 3.12.4 | torch 9 | all default | 7 |" in again
    other = with_row(again, row | {"Python": "3.13.0"})
    assert len(other.splitlines()) == len(again.splitlines()) + 1
