package raftstore

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/rxvision/rxvision/cluster"
)

// Server is one member of the region's Raft configuration.
type Server struct {
	ID, Name, Address string
	Leader, Voter     bool
}

// leadership is what this server knows of its own leadership, for any number of
// waiters and subscribers.
type leadership struct {
	mu      sync.Mutex
	leader  bool
	changed chan struct{} // closed at the next change
	subs    map[chan bool]struct{}
	closed  bool
}

func (l *leadership) init() {
	l.changed, l.subs = make(chan struct{}), map[chan bool]struct{}{}
}

func (l *leadership) set(leader bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed || leader == l.leader {
		return
	}
	l.leader = leader
	close(l.changed)
	l.changed = make(chan struct{})
	for ch := range l.subs {
		select {
		case <-ch: // the older news
		default:
		}
		ch <- leader
	}
}

func (l *leadership) get() (leader bool, changed <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.leader, l.changed
}

func (l *leadership) subscribe() (ch chan bool, cancel func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	ch = make(chan bool, 1)
	if l.closed {
		close(ch)
		return ch, func() {}
	}
	ch <- l.leader
	l.subs[ch] = struct{}{}
	return ch, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if _, ok := l.subs[ch]; ok {
			delete(l.subs, ch)
			close(ch)
		}
	}
}

// close ends all subscriptions.
func (l *leadership) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed, l.leader = true, false
	for ch := range l.subs {
		close(ch)
	}
	clear(l.subs)
}

// lead follows raft's leadership. This server counts as leader only once all
// entries of earlier terms are applied to its state.
func (s *Store) lead(notify <-chan bool) {
	for {
		select {
		case leader := <-notify:
			if leader {
				leader = s.catchUp()
			}
			s.leading.set(leader)
			s.log.Debug("leadership changed", "leader", leader)
		case <-s.closing:
			s.leading.set(false)
			return
		}
	}
}

// catchUp waits until the log up to now is applied; false when leadership was lost meanwhile.
func (s *Store) catchUp() bool {
	for {
		err := s.raft.Barrier(enqueueTimeout).Error()
		if err == nil {
			break
		}
		if !errors.Is(err, raft.ErrEnqueueTimeout) || s.raft.State() != raft.Leader || s.isClosing() {
			return false
		}
	}
	s.moveAddress()
	return true
}

// moveAddress records the address that a lone server listens at now. (With
// peers, they would have to be told before they can elect it.)
func (s *Store) moveAddress() {
	servers := s.raft.GetConfiguration()
	if err := servers.Error(); err != nil {
		return // only on shutdown
	}
	c, here := servers.Configuration(), s.trans.LocalAddr()
	if len(c.Servers) != 1 || c.Servers[0].ID != s.id || c.Servers[0].Address == here {
		return
	}
	if err := s.raft.AddVoter(s.id, here, 0, enqueueTimeout).Error(); err != nil {
		s.log.Warn("could not record this server's new address", "address", here, "error", err)
	}
}

func (s *Store) isClosing() bool {
	select {
	case <-s.closing:
		return true
	default:
		return false
	}
}

// NoLeader says why there is no leader, as far as this server knows: ErrNoLeader,
// or that the disk is full.
func (s *Store) NoLeader() error {
	if s.disk.isFull() {
		return s.disk.errFull()
	}
	return cluster.ErrNoLeader
}

// waitLeader returns when this server is the leader; when ctx ends first
// ErrNoLeader, or that the disk is full if this is why.
func (s *Store) waitLeader(ctx context.Context) error {
	for {
		if err := s.Err(); err != nil {
			return err
		}
		if ctx.Err() != nil {
			return s.NoLeader()
		}
		leader, changed := s.leading.get()
		if leader {
			return nil
		}
		select {
		case <-changed:
		case <-s.failed:
		case <-ctx.Done():
		case <-s.closing:
			return errClosing
		}
	}
}

// IsLeader says whether this server is the leader, with every earlier entry applied.
func (s *Store) IsLeader() bool {
	leader, _ := s.leading.get()
	return leader
}

// LeaderCh tells of this server's leadership: the current one at once, then each
// change. A slow receiver misses what was overtaken; true after true means that
// leadership was lost and won again in between. The channel is closed when ctx
// ends or the store is closed.
func (s *Store) LeaderCh(ctx context.Context) <-chan bool {
	ch, cancel := s.leading.subscribe()
	context.AfterFunc(ctx, cancel)
	return ch
}

// Leader gives the leader's ID and Raft address, both empty when there is none.
func (s *Store) Leader() (id, address string) {
	addr, sid := s.raft.LeaderWithID()
	return string(sid), string(addr)
}

// ID is this server's own, kept in its data folder.
func (s *Store) ID() string { return string(s.id) }

// Addr is the Raft address of this server as others reach it.
func (s *Store) Addr() string { return string(s.trans.LocalAddr()) }

// LastContact is how long ago the leader was heard of; 0 on the leader itself,
// negative when it never was.
func (s *Store) LastContact() time.Duration {
	if s.raft.State() == raft.Leader {
		return 0
	}
	last := s.raft.LastContact()
	if last.IsZero() {
		return -1
	}
	return time.Since(last)
}

// Stats are raft's own figures, by the names that `nomad agent-info` shows:
// applied_index, commit_index, fsm_pending, last_contact, last_log_index,
// last_log_term, last_snapshot_index, last_snapshot_term, num_peers, state, term…
func (s *Store) Stats() map[string]string {
	stats := s.raft.Stats()
	stats["latest_configuration_index"] = strconv.FormatUint(s.fsm.membersIndex(), 10) // raft says 0
	return stats
}

// Servers lists the members of the newest Raft configuration and the log index that set it.
func (s *Store) Servers() ([]Server, uint64, error) {
	future := s.raft.GetConfiguration()
	if err := future.Error(); err != nil {
		return nil, 0, fmt.Errorf("read raft configuration: %w", err)
	}
	leader, _ := s.Leader()
	var out []Server
	for _, m := range future.Configuration().Servers {
		server := Server{ID: string(m.ID), Address: string(m.Address), Leader: string(m.ID) == leader, Voter: m.Suffrage == raft.Voter}
		if m.ID == s.id {
			server.Name = s.cfg.Name
		}
		out = append(out, server)
	}
	return out, s.fsm.membersIndex(), nil
}
