// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a console device and its driver tell each other about ports (virtio 1.2, 5.3.6.2), as plain data.
//!
//! ```text
//!   driver: DEVICE_READY ─► ADD          of each port
//!   driver: PORT_READY   ─► CONSOLE_PORT of a console, NAME of a named one, RESIZE of a console,
//!                           OPEN 1       where the host's side is open
//!   host opens or closes ─► OPEN 1 or 0
//!   driver: OPEN 1 or 0  ─► the guest's program has opened or closed the port
//! ```
//!
//! There is no queue of messages: what a port is still to be told is a set, of which each member is there once however
//! often its reason comes. A driver that asks without end, or gives no buffers, costs no memory.

#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

/// `VIRTIO_CONSOLE_DEVICE_READY`: the driver has begun (1) or cannot (0).
pub const DEVICE_READY: u16 = 0;
/// `VIRTIO_CONSOLE_PORT_ADD`: there is this port.
pub const PORT_ADD: u16 = 1;
/// `VIRTIO_CONSOLE_PORT_READY`: the driver has added the port (1) or cannot (0).
pub const PORT_READY: u16 = 3;
/// `VIRTIO_CONSOLE_CONSOLE_PORT`: the port is a console.
pub const CONSOLE_PORT: u16 = 4;
/// `VIRTIO_CONSOLE_RESIZE`: the console's size follows.
pub const RESIZE: u16 = 5;
/// `VIRTIO_CONSOLE_PORT_OPEN`: the other side is open (1) or closed (0).
pub const PORT_OPEN: u16 = 6;
/// `VIRTIO_CONSOLE_PORT_NAME`: the port's name follows.
pub const PORT_NAME: u16 = 7;

/// `struct virtio_console_control`, what every message begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// The port, where the event has one.
    pub port: u32,
    /// What it says.
    pub event: u16,
    /// The event's own.
    pub value: u16,
}

impl Message {
    /// Its length, bytes.
    pub const LEN: usize = 8;

    /// As it is in a buffer.
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..4].copy_from_slice(&self.port.to_le_bytes());
        bytes[4..6].copy_from_slice(&self.event.to_le_bytes());
        bytes[6..].copy_from_slice(&self.value.to_le_bytes());
        bytes
    }

    /// From a buffer.
    pub fn from_bytes(bytes: [u8; Self::LEN]) -> Self {
        let [a, b, c, d, e, f, g, h] = bytes;
        Message {
            port: u32::from_le_bytes([a, b, c, d]),
            event: u16::from_le_bytes([e, f]),
            value: u16::from_le_bytes([g, h]),
        }
    }
}

/// A terminal's size. Zeros: not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Columns.
    pub cols: u16,
    /// Rows.
    pub rows: u16,
}

impl Size {
    /// As it is in the configuration space and behind a `RESIZE`: columns first.
    pub fn to_bytes(self) -> [u8; 4] {
        let ([a, b], [c, d]) = (self.cols.to_le_bytes(), self.rows.to_le_bytes());
        [a, b, c, d]
    }
}

/// What a port is, which never changes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kind {
    /// The driver is told of it. One that is not there only keeps its number.
    pub exists: bool,
    /// A console: hvc in a Linux guest.
    pub is_console: bool,
    /// `/dev/virtio-ports/NAME` there.
    pub name: Option<String>,
}

/// What a port may have to be told, in the order in which it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Notice {
    /// `PORT_ADD`
    Add = 1 << 0,
    /// `CONSOLE_PORT`
    Console = 1 << 1,
    /// `PORT_NAME`
    Name = 1 << 2,
    /// `RESIZE`
    Resize = 1 << 3,
    /// `PORT_OPEN` 0
    Close = 1 << 4,
    /// `PORT_OPEN` 1
    Open = 1 << 5,
}

const NOTICES: [Notice; 6] = [
    Notice::Add,
    Notice::Console,
    Notice::Name,
    Notice::Resize,
    Notice::Close,
    Notice::Open,
];

/// What is between a port and its driver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Talk {
    /// The driver has added the port.
    pub is_ready: bool,
    /// A program of the guest's has it open.
    pub guest_open: bool,
    /// The host's side is open.
    pub host_open: bool,
    /// The driver was told last that it is.
    pub told_open: bool,
    /// A set of [`Notice`]s.
    owed: u8,
}

impl Talk {
    fn owe(&mut self, notice: Notice, owed: bool) {
        self.owed &= !(notice as u8);
        if owed {
            self.owed |= notice as u8;
        }
    }
}

/// What a message of the driver's has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// Nothing that the ports' data need to know: it is answered, or ignored.
    Nothing,
    /// The guest has opened or closed this port.
    GuestOpen(usize, bool),
    /// The driver cannot use this port, or the whole device.
    Refused(Option<usize>),
}

/// The ports of a device as their driver knows them.
#[derive(Clone, Debug)]
pub struct Dialogue {
    kinds: Vec<Kind>,
    talks: Vec<Talk>,
    size: Size,
    /// The driver has accepted `VIRTIO_CONSOLE_F_SIZE`.
    sizes: bool,
}

impl Dialogue {
    /// Before the driver's first message.
    pub fn new(kinds: Vec<Kind>, size: Size) -> Self {
        Dialogue {
            talks: vec![Talk::default(); kinds.len()],
            kinds,
            size,
            sizes: false,
        }
    }

    /// In this state. What the state lacks is as at the start.
    pub fn from_state(kinds: Vec<Kind>, size: Size, mut talks: Vec<Talk>) -> Self {
        talks.resize(kinds.len(), Talk::default());
        Dialogue {
            talks,
            ..Dialogue::new(kinds, size)
        }
    }

    /// The driver has reset the device. What the host's side does is as it was.
    pub fn reset(&mut self) {
        for talk in &mut self.talks {
            *talk = Talk {
                host_open: talk.host_open,
                ..Talk::default()
            };
        }
    }

    /// Whether sizes are told.
    pub fn set_sizes(&mut self, told: bool) {
        self.sizes = told;
    }

    /// Each port's part.
    pub fn talks(&self) -> &[Talk] {
        &self.talks
    }

    /// What each port is.
    pub fn kinds(&self) -> &[Kind] {
        &self.kinds
    }

    /// The size that the driver is told.
    pub fn size(&self) -> Size {
        self.size
    }

    /// Whether a program of the guest's has this port open.
    pub fn is_guest_open(&self, port: usize) -> bool {
        self.talks.get(port).is_some_and(|talk| talk.guest_open)
    }

    /// The guest has this port open as long as the device is used: a device without control queues has no other way.
    pub fn set_guest_open(&mut self, port: usize) {
        if let Some(talk) = self.talks.get_mut(port) {
            talk.guest_open = true;
        }
    }

    /// Takes a message of the driver's. What makes no sense is ignored.
    pub fn receive(&mut self, message: Message) -> Heard {
        let on = message.value != 0;
        if message.event == DEVICE_READY {
            if !on {
                return Heard::Refused(None);
            }
            for (talk, kind) in self.talks.iter_mut().zip(&self.kinds) {
                talk.owe(Notice::Add, kind.exists);
            }
            return Heard::Nothing;
        }
        let port = usize::try_from(message.port).unwrap_or(usize::MAX);
        let (Some(talk), Some(kind)) = (self.talks.get_mut(port), self.kinds.get(port)) else {
            return Heard::Nothing;
        };
        if !kind.exists {
            return Heard::Nothing;
        }
        match message.event {
            PORT_READY if !on => {
                let was_open = std::mem::take(&mut talk.guest_open);
                *talk = Talk {
                    host_open: talk.host_open,
                    told_open: talk.told_open,
                    ..Talk::default()
                };
                match was_open {
                    true => Heard::GuestOpen(port, false),
                    false => Heard::Refused(Some(port)),
                }
            }
            PORT_READY => {
                talk.is_ready = true;
                talk.owe(Notice::Console, kind.is_console);
                talk.owe(Notice::Name, kind.name.is_some());
                talk.owe(Notice::Resize, kind.is_console && self.sizes);
                // It may say so again and again, and have been told before.
                talk.owe(Notice::Close, talk.told_open && !talk.host_open);
                talk.owe(Notice::Open, talk.host_open);
                Heard::Nothing
            }
            PORT_OPEN if talk.guest_open != on => {
                talk.guest_open = on;
                Heard::GuestOpen(port, on)
            }
            // The device's own messages, and what later versions may have.
            _ => Heard::Nothing,
        }
    }

    /// The host's side of a port is open now, or not. One that closes and opens again is told as both.
    pub fn set_host_open(&mut self, port: usize, open: bool) {
        let Some(talk) = self.talks.get_mut(port) else {
            return;
        };
        if std::mem::replace(&mut talk.host_open, open) == open || !talk.is_ready {
            return;
        }
        talk.owe(Notice::Open, open);
        if !open {
            talk.owe(Notice::Close, talk.told_open);
        }
    }

    /// The console's size is this now.
    pub fn set_size(&mut self, size: Size) {
        if std::mem::replace(&mut self.size, size) == size {
            return;
        }
        for (talk, kind) in self.talks.iter_mut().zip(&self.kinds) {
            if talk.is_ready && kind.is_console && self.sizes {
                talk.owe(Notice::Resize, true);
            }
        }
    }

    /// What is to be told next: which port, and what.
    pub fn next(&self) -> Option<(usize, Notice)> {
        let mut owing = self.talks.iter().enumerate();
        let (port, talk) = owing.find(|(_, talk)| talk.owed != 0)?;
        let mut notices = NOTICES.into_iter();
        let notice = notices.find(|notice| talk.owed & *notice as u8 != 0);
        // Bits that a foreign state has beyond these say nothing.
        notice.map(|notice| (port, notice))
    }

    /// It has been told.
    pub fn told(&mut self, port: usize, notice: Notice) {
        let Some(talk) = self.talks.get_mut(port) else {
            return;
        };
        talk.owe(notice, false);
        match notice {
            Notice::Open => talk.told_open = true,
            Notice::Close => talk.told_open = false,
            _ => {}
        }
    }

    /// The message for it.
    pub fn bytes(&self, port: usize, notice: Notice) -> Vec<u8> {
        let (event, value) = match notice {
            Notice::Add => (PORT_ADD, 1),
            Notice::Console => (CONSOLE_PORT, 1),
            Notice::Name => (PORT_NAME, 1),
            Notice::Resize => (RESIZE, 1),
            Notice::Close => (PORT_OPEN, 0),
            Notice::Open => (PORT_OPEN, 1),
        };
        let message = Message {
            port: u32::try_from(port).unwrap_or(u32::MAX),
            event,
            value,
        };
        let mut bytes = message.to_bytes().to_vec();
        match notice {
            // Without a terminating zero (5.3.6.2).
            Notice::Name => {
                let name = self.kinds.get(port).and_then(|kind| kind.name.as_deref());
                bytes.extend_from_slice(name.unwrap_or_default().as_bytes());
            }
            Notice::Resize => bytes.extend_from_slice(&self.size.to_bytes()),
            _ => {}
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn dialogue() -> Dialogue {
        let console = Kind {
            exists: true,
            is_console: true,
            name: None,
        };
        let named = |name: &str| Kind {
            exists: true,
            is_console: false,
            name: Some(name.into()),
        };
        let size = Size { cols: 80, rows: 24 };
        let kinds = vec![console, named("a"), Kind::default(), named("b")];
        let mut dialogue = Dialogue::new(kinds, size);
        dialogue.set_sizes(true);
        dialogue
    }

    fn says(port: u32, event: u16, value: u16) -> Message {
        Message { port, event, value }
    }

    /// All that is owed, told.
    fn tell(dialogue: &mut Dialogue) -> Vec<(usize, Notice)> {
        let mut told = Vec::new();
        while let Some((port, notice)) = dialogue.next() {
            dialogue.told(port, notice);
            told.push((port, notice));
        }
        told
    }

    #[test]
    fn a_port_is_added_then_described_then_opened() {
        let mut dialogue = dialogue();
        dialogue.set_host_open(0, true);
        assert_eq!(tell(&mut dialogue), []);
        dialogue.receive(says(0, DEVICE_READY, 1));
        let added = [(0, Notice::Add), (1, Notice::Add), (3, Notice::Add)];
        assert_eq!(tell(&mut dialogue), added);
        dialogue.receive(says(0, PORT_READY, 1));
        dialogue.receive(says(1, PORT_READY, 1));
        let described = [
            (0, Notice::Console),
            (0, Notice::Resize),
            (0, Notice::Open),
            (1, Notice::Name),
        ];
        assert_eq!(tell(&mut dialogue), described);
        dialogue.set_host_open(1, true);
        assert_eq!(tell(&mut dialogue), [(1, Notice::Open)]);
    }

    #[test]
    fn a_host_that_goes_and_comes_is_told_as_both_and_one_that_comes_and_goes_as_neither() {
        let mut dialogue = dialogue();
        dialogue.receive(says(1, PORT_READY, 1));
        dialogue.set_host_open(1, true);
        dialogue.set_host_open(1, false);
        assert_eq!(tell(&mut dialogue), [(1, Notice::Name)]);
        dialogue.set_host_open(1, true);
        assert_eq!(tell(&mut dialogue), [(1, Notice::Open)]);
        dialogue.set_host_open(1, false);
        dialogue.set_host_open(1, true);
        assert_eq!(tell(&mut dialogue), [(1, Notice::Close), (1, Notice::Open)]);
    }

    #[test]
    fn a_driver_that_is_ready_again_is_told_of_a_host_that_has_gone() {
        // It may say first that it is not, and the host may go before that or behind it.
        for (unready, early) in [(false, false), (false, true), (true, false), (true, true)] {
            let mut dialogue = dialogue();
            dialogue.receive(says(3, PORT_READY, 1));
            dialogue.set_host_open(3, true);
            let told = [(3, Notice::Name), (3, Notice::Open)];
            assert_eq!(tell(&mut dialogue), told);
            if early {
                dialogue.set_host_open(3, false);
            }
            if unready {
                dialogue.receive(says(3, PORT_READY, 0));
            }
            dialogue.receive(says(3, PORT_READY, 1));
            dialogue.set_host_open(3, false);
            let told = [(3, Notice::Name), (3, Notice::Close)];
            assert_eq!(tell(&mut dialogue), told, "{unready} {early}");
        }
    }

    #[test]
    fn messages_have_the_layout_of_the_standard() {
        let dialogue = dialogue();
        let bytes = dialogue.bytes(3, Notice::Name);
        assert_eq!(bytes, [3, 0, 0, 0, 7, 0, 1, 0, b'b']);
        let bytes = dialogue.bytes(0, Notice::Resize);
        assert_eq!(bytes, [0, 0, 0, 0, 5, 0, 1, 0, 80, 0, 24, 0]);
        let message = says(0x0403_0201, 0x0605, 0x0807);
        assert_eq!(message.to_bytes(), [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(Message::from_bytes(message.to_bytes()), message);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Says(u32, u16, u16),
        Host(usize, bool),
        Size(u16, u16),
        Tell(usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (0..6u32, 0..9u16, 0..3u16).prop_map(|(p, e, v)| Step::Says(p, e, v)),
            any::<(u32, u16, u16)>().prop_map(|(p, e, v)| Step::Says(p, e, v)),
            (0..5usize, any::<bool>()).prop_map(|(p, o)| Step::Host(p, o)),
            (0..3u16, 0..3u16).prop_map(|(c, r)| Step::Size(c, r)),
            (0..4usize).prop_map(Step::Tell),
        ];
        proptest::collection::vec(step, 0..60)
    }

    proptest! {
        #[test]
        fn whatever_a_driver_says_it_knows_in_the_end_who_is_open_and_the_size(steps in steps()) {
            let mut dialogue = dialogue();
            let (mut open, mut size) = ([false; 4], None);
            let mut ready = [false; 4];
            // A driver that believes what it is told.
            let mut hear = |dialogue: &mut Dialogue, most: usize| {
                for _ in 0..most {
                    let Some((port, notice)) = dialogue.next() else { break };
                    match notice {
                        Notice::Open => open[port] = true,
                        Notice::Close => {
                            assert!(open[port]);
                            open[port] = false;
                        }
                        Notice::Resize => size = Some(dialogue.size()),
                        _ => {}
                    }
                    dialogue.told(port, notice);
                }
                (open, size)
            };
            for step in steps {
                match step {
                    Step::Says(port, event, value) => {
                        dialogue.receive(says(port, event, value));
                        if event == PORT_READY && matches!(port, 0 | 1 | 3) {
                            ready[port as usize] = value != 0;
                        }
                    }
                    Step::Host(port, open) => dialogue.set_host_open(port, open),
                    Step::Size(cols, rows) => dialogue.set_size(Size { cols, rows }),
                    Step::Tell(most) => drop(hear(&mut dialogue, most)),
                }
                // A restore at any moment changes nothing.
                let state = dialogue.talks().to_vec();
                let (kinds, size) = (dialogue.kinds().to_vec(), dialogue.size());
                dialogue = Dialogue::from_state(kinds, size, state);
                dialogue.set_sizes(true);
            }
            let (open, size) = hear(&mut dialogue, 1000);
            prop_assert_eq!(dialogue.next(), None);
            for port in 0..4 {
                if ready[port] {
                    prop_assert_eq!(open[port], dialogue.talks()[port].host_open);
                }
            }
            if let (true, Some(size)) = (ready[0], size) {
                prop_assert_eq!(size, dialogue.size());
            }
        }
    }
}
