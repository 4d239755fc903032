from .entries import Card as Card
from .entries import CardClaim as CardClaim
from .entries import Reference as Reference
from .entries import card as card
from .entries import cards as cards
from .making import create as create
from .ranking import Hit as Hit
from .ranking import search as search
