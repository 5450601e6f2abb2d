// The page: wires the buttons, and shows what the event stream says.
import { showCounters, showDatabase, showTour, showUnread } from "./counters.js";
import { showLocks } from "./locks.js";
import * as orders from "./orders.js";
import * as products from "./products.js";
import * as provocations from "./provocations.js";
import { follow } from "./stream.js";
import * as till from "./till.js";

orders.start();
products.start();
till.start();
provocations.start();

follow({
  counters: showCounters,
  database: showDatabase,
  locks: showLocks,
  orders: orders.showOrders,
  products: products.showProducts,
  till: till.showTill,
  tour: showTour,
  unread: showUnread,
});
