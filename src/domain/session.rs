//! The protocol of a gateway's stream, pure: which frame may come when.
//!
//! | | hello | heartbeat, bind, unbind, ack, watch, status, digest |
//! |---|---|---|
//! | fresh | attaches, or is refused and may be tried again | illegal |
//! | attached | illegal | legal, for this gateway's own life only |
//! | over | illegal | illegal |

use crate::domain::id::Epoch;
use crate::domain::id::GatewayAddr;

/// What a gateway sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame {
    Hello,
    Heartbeat,
    Bind,
    Unbind,
    Ack,
    Watch,
    Status,
    /// What it was asked of its connections.
    Digest,
}

/// Why a frame ends the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Illegal {
    #[error("the first frame must be hello")]
    NotAttached,
    #[error("hello was said already")]
    Attached,
    #[error("the stream is over")]
    Over,
    #[error("gateway_addr must be empty, or the one of the hello")]
    OtherGateway,
    #[error("gateway_epoch must be 0, or the one of the welcome")]
    OtherEpoch,
}

/// How far a stream has come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Session {
    #[default]
    Fresh,
    Attached {
        gateway: GatewayAddr,
        epoch: Epoch,
        /// Numbers the streams of one life.
        no: u64,
    },
    Over,
}

impl Session {
    /// Whether `frame` is legal now.
    pub fn allows(&self, frame: Frame) -> Result<(), Illegal> {
        match (self, frame) {
            (Self::Fresh, Frame::Hello) => Ok(()),
            (Self::Fresh, _) => Err(Illegal::NotAttached),
            (Self::Attached { .. }, Frame::Hello) => Err(Illegal::Attached),
            (Self::Attached { .. }, _) => Ok(()),
            (Self::Over, _) => Err(Illegal::Over),
        }
    }

    /// Whether a frame that names a gateway and an epoch speaks for this stream. Both may be left out.
    pub fn speaks_for(&self, addr: &str, claimed: u64) -> Result<(&GatewayAddr, Epoch), Illegal> {
        let Self::Attached { gateway, epoch, .. } = self else { return Err(Illegal::NotAttached) };
        if !addr.is_empty() && addr != gateway.as_str() {
            return Err(Illegal::OtherGateway);
        }
        if claimed != 0 && claimed != epoch.0 {
            return Err(Illegal::OtherEpoch);
        }
        Ok((gateway, *epoch))
    }

    /// The welcome was sent.
    pub fn attach(&mut self, gateway: GatewayAddr, epoch: Epoch, no: u64) {
        *self = Self::Attached { gateway, epoch, no };
    }

    /// Ends it; returns the life and the stream's number, if it was attached.
    pub fn end(&mut self) -> Option<(Epoch, u64)> {
        match std::mem::replace(self, Self::Over) {
            Self::Attached { epoch, no, .. } => Some((epoch, no)),
            Self::Fresh | Self::Over => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attached() -> Session {
        let mut session = Session::default();
        session.attach(GatewayAddr::parse("gw-1:7000").unwrap(), Epoch(5), 1);
        session
    }

    #[test]
    fn which_frame_may_come_when() {
        let over = || {
            let mut session = attached();
            assert_eq!(session.end(), Some((Epoch(5), 1)));
            assert_eq!(session.end(), None);
            session
        };
        let others = [Frame::Heartbeat, Frame::Bind, Frame::Unbind, Frame::Ack, Frame::Watch, Frame::Status, Frame::Digest];
        for frame in others {
            assert_eq!(Session::Fresh.allows(frame), Err(Illegal::NotAttached), "{frame:?}");
            assert_eq!(attached().allows(frame), Ok(()), "{frame:?}");
            assert_eq!(over().allows(frame), Err(Illegal::Over), "{frame:?}");
        }
        assert_eq!(Session::Fresh.allows(Frame::Hello), Ok(()));
        assert_eq!(attached().allows(Frame::Hello), Err(Illegal::Attached));
        assert_eq!(over().allows(Frame::Hello), Err(Illegal::Over));
    }

    #[test]
    fn a_stream_speaks_for_its_own_life_only() {
        let session = attached();
        for (addr, epoch, want) in [
            ("", 0, None),
            ("gw-1:7000", 5, None),
            ("gw-2:7000", 0, Some(Illegal::OtherGateway)),
            ("", 4, Some(Illegal::OtherEpoch)),
        ] {
            assert_eq!(session.speaks_for(addr, epoch).err(), want, "{addr} {epoch}");
        }
        assert_eq!(Session::Fresh.speaks_for("", 0).err(), Some(Illegal::NotAttached));
    }
}
