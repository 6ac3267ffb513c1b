"""The report: one page that shows who earned what. :func:`write_report` writes it, :func:`serve` shows it while a run goes on."""

from ccpo.report.command import serve, write_report

__all__ = ["serve", "write_report"]
