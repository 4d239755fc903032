from .page import build_report as build_report
from .table import print_result as print_result
