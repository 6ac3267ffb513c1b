"""placeholder, replaced below"""

from ccpo.compare.progress import every_cell
from ccpo.compare.store import write_results
from ccpo.runs import versions


def write_report(study, runner, store, *, source, page, say):
    records = {c.fingerprint: r for c in every_cell(runner.state) if (r := runner.result(c)) is not None}
    failures = {
        c.id: f.error
        for c in every_cell(runner.state)
        if runner.result(c) is None and (f := store.failure(c)) is not None
    }
    write_results(store.results, study.name, versions()["ccpo"], records, failures)
    say(f"Results: {store.results}")
