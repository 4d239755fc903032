from .card import Card as Card
from .card import CardClaim as CardClaim
from .card import Reference as Reference
from .card import card as card
from .card import cards as cards
from .create import create as create
from .search import Hit as Hit
from .search import search as search
