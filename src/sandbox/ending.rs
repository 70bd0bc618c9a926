//! How a command's end is told, from what the kernel said of it and what the node did meanwhile. The same for every
//! backend.

use super::{Exit, Limit};

/// What happened around a command.
#[derive(Debug, Clone, Copy, Default)]
pub struct Circumstances {
    /// The limit that ended its sandbox.
    pub limit: Option<Limit>,
    /// Its output was more than allowed.
    pub cut: bool,
    pub timed_out: bool,
    /// It was ended because its sandbox did nothing.
    pub idle: bool,
    /// The kernel killed something inside for want of memory.
    pub starved: bool,
}

impl Circumstances {
    /// `natural` is the kernel's word; none when the sandbox went first. No end is told when nothing explains that.
    pub fn exit(self, natural: Option<Exit>) -> Option<Exit> {
        match natural {
            None => self.limit.map(|limit| Exit::Limit { limit }),
            Some(_) if self.cut => Some(Exit::Limit { limit: Limit::Output }),
            Some(Exit::Code { code: 0 }) => natural,
            Some(_) if self.timed_out => Some(Exit::Timeout),
            Some(_) if self.idle => Some(Exit::Limit { limit: Limit::Idle }),
            Some(Exit::Code { .. } | Exit::Signal { .. }) if self.starved => {
                Some(Exit::Limit { limit: Limit::Memory })
            }
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_that_succeeded_did_so_whatever_happened_beside_it_but_for_its_output() {
        let all = Circumstances {
            limit: Some(Limit::Wall),
            cut: false,
            timed_out: true,
            idle: true,
            starved: true,
        };
        let success = Some(Exit::Code { code: 0 });
        assert_eq!(all.exit(success), success);
        let cut = Circumstances { cut: true, ..all };
        assert_eq!(cut.exit(success), Some(Exit::Limit { limit: Limit::Output }));
    }

    #[test]
    fn a_sandbox_that_went_without_a_reason_tells_no_end() {
        assert_eq!(Circumstances::default().exit(None), None);
        let wall = Circumstances { limit: Some(Limit::Wall), ..Circumstances::default() };
        assert_eq!(wall.exit(None), Some(Exit::Limit { limit: Limit::Wall }));
    }

    #[test]
    fn a_killed_command_is_told_with_the_cause() {
        let killed = Some(Exit::Signal { signal: 9 });
        assert_eq!(Circumstances::default().exit(killed), killed);
        let timed_out = Circumstances { timed_out: true, ..Circumstances::default() };
        assert_eq!(timed_out.exit(killed), Some(Exit::Timeout));
        let idle = Circumstances { idle: true, ..Circumstances::default() };
        assert_eq!(idle.exit(killed), Some(Exit::Limit { limit: Limit::Idle }));
        let starved = Circumstances { starved: true, ..Circumstances::default() };
        assert_eq!(starved.exit(killed), Some(Exit::Limit { limit: Limit::Memory }));
    }
}
