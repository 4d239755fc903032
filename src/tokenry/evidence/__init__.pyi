from .records import CHECKS as CHECKS
from .records import Record as Record
from .records import all_records as all_records
from .records import latest as latest
from .records import project_records as project_records
from .records import save_project as save_project
from .records import save_user as save_user
from .records import user_records as user_records
