//! What goes wrong with machines, the network's parts and clocks.

use crate::{
    disk::Image,
    world::{Event, Fault, World},
};

impl World {
    pub(crate) fn fault(&mut self, fault: Fault) {
        let count = self.nodes.len() as u64;
        let node = usize::try_from(self.dice.range(0..count)).unwrap_or(0);
        let pause = self.dice.range(1_000..60_000);
        match fault {
            Fault::Crash => {
                // Now, or in the middle of one of the next writes.
                if self.dice.permille(300) {
                    self.nodes[node].disk.cut_power();
                    self.die(node);
                } else {
                    let writes = self.dice.range(1..30);
                    self.nodes[node].disk.fail_power_in(writes);
                }
            }
            Fault::Part => {
                self.network.sides = (0..self.nodes.len()).map(|_| u8::from(self.dice.permille(500))).collect();
                self.cut_across();
            }
            Fault::Join => self.network.sides.clear(),
            Fault::Fill => {
                self.nodes[node].disk.set_full(true);
                self.after(pause, Event::Fault(Fault::Empty { node }));
            }
            Fault::Empty { node } => self.nodes[node].disk.set_full(false),
            Fault::Rot => {
                let node = node.max(1);
                self.nodes[node].disk.cut_power();
                self.die(node);
                self.nodes[node].disk.rot();
                self.forgive(node);
            }
            Fault::Snapshot => {
                let image = self.nodes[node].disk.image();
                // What it signs for them is not in the picture.
                self.join_at(node, 10);
                self.after(pause, Event::Fault(Fault::Restore { node, image }));
            }
            Fault::Restore { node, image } => self.restore(node, image),
            Fault::Skew => {
                let days = i64::try_from(self.dice.range(0..6 * 86_400_000)).unwrap_or(0) - 3 * 86_400_000;
                self.nodes[node].skew = if self.dice.permille(500) { days } else { days / 1000 };
                self.after(pause, Event::Fault(Fault::SetRight { node }));
            }
            Fault::SetRight { node } => self.nodes[node].skew = 0,
        }
    }

    /// A damaged disk may lose what nobody else has: nothing can be done about that. What the founder's machine has,
    /// which is never damaged and never put out, stays.
    pub(crate) fn forgive(&mut self, damaged: usize) {
        let keeper = self.nodes[0].running.as_ref().map(|running| &running.replica);
        self.acknowledged.retain(|entry, (_, at)| {
            *at != damaged || keeper.is_some_and(|replica| replica.ledger().get(entry).is_some())
        });
    }

    /// The machine is stopped, and its disk is as it was. What its manager was told before it remembers.
    fn restore(&mut self, number: usize, image: Image) {
        let node = &mut self.nodes[number];
        let Some(running) = node.running.as_ref() else { return };
        let mut remembered = running.replica.entries();
        remembered.extend(node.restored.take().unwrap_or_default());
        node.restored = Some(remembered);
        node.disk.cut_power();
        node.disk.put_back(image);
        let back = self.die(number);
        // It is back, and the first that it hears is of somebody who wants in.
        self.join_at(number, back + 1);
    }

    /// The power has failed: the controller is gone, and comes back after a while: after how long.
    pub(crate) fn die(&mut self, number: usize) -> u64 {
        let node = &mut self.nodes[number];
        if node.running.take().is_none() && node.life == 0 {
            return 0;
        }
        let pause = self.dice.range(500..40_000);
        self.after(pause, Event::Start { node: number });
        let cut: Vec<_> = self.connections_of(number);
        for (connection, end) in cut {
            if let Some(known) = self.network.connections.get_mut(&connection) {
                known.ends[end].open = false;
                known.ends[end].linked = false;
            }
            let timeout = self.dice.range(100..30_000);
            self.after(timeout, Event::Over { connection, end: 1 - end });
        }
        pause
    }
}
