"""The tour: every promise tried out as a client would, with PostgreSQL itself as the witness."""

from examples.shop.client import Shop, Witness
from examples.shop.console import Console
from examples.shop.crowd_steps import hang_ups, serializable_decrements
from examples.shop.follower_steps import followed_orders
from examples.shop.settings import Settings
from examples.shop.steps import mail_after_commit, nested_step, readable_at_once, swallowed_error
from examples.shop.tag_steps import tagged_orders
from examples.shop.till_steps import closing_the_till, who_is_in_the_way

STEPS = {
    "An order is there for everyone when its response arrives": readable_at_once,
    "A mail leaves after the commit, or not at all": mail_after_commit,
    "A nested step that fails takes back its own work and leaves the rest": nested_step,
    "A swallowed database error is reported instead of lost": swallowed_error,
    "Orders are tagged: one tag, another set of them, 50,000 at once": tagged_orders,
    "The till is closed while clients keep writing": closing_the_till,
    "A lock that times out names its holder": who_is_in_the_way,
    "1,000 clients follow their orders over one database connection": followed_orders,
    "50 clients decrement one stock under SERIALIZABLE": serializable_decrements,
    "200 requests on a pool of 5, and half of the clients hang up": hang_ups,
}


async def take_tour(address: str, settings: Settings, console: Console) -> bool:
    """Walk through the steps; False after the first that did not prove what it says."""
    async with Shop.at(address) as shop, Witness.of(settings) as witness:
        for number, (title, step) in enumerate(STEPS.items(), 1):
            console.title(number, title)
            try:
                await step(shop, witness, console)
            except Exception as failure:
                console.failed(failure)
                return False
    return True
