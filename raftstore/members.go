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
			if leader {
				s.ops.Go(s.nameCluster)
			} else {
				s.campaignAlone()
			}
		case <-s.closing:
			s.leading.set(false)
			return
		}
	}
}

// catchUp waits until the log up to now is applied; false when leadership was lost meanwhile.
func (s *Store) catchUp() bool {
	for {
		err := s.barrier()
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

// settle asks raft for something and waits for its answer, as everyone must who
// waits for raft. A fault of the disk ends goroutines of raft, and what these had
// been handed, or would have been, is never answered: settle gives the reason then,
// and leaves a goroutine behind, for the process ends soon. What ask is given must
// stay valid for it.
func (s *Store) settle(ask func() error) error {
	answer := make(chan error, 1)
	go func() { answer <- ask() }()
	select {
	case err := <-answer:
		if err != nil {
			err = cmpErr(s.Err(), err)
		}
		return err
	case <-s.mute:
		return cmpErr(s.Err(), errClosing)
	}
}

// silence says that raft may answer no longer.
func (s *Store) silence() { s.muteOnce.Do(func() { close(s.mute) }) }

// moveAddress records the address at which this leader listens now. (The others
// learn it of a follower when that joins.)
func (s *Store) moveAddress() {
	here := s.trans.LocalAddr()
	for _, m := range s.configuration().Servers {
		if m.ID != s.id || m.Address == here {
			continue
		}
		if err := s.settle(func() error { return s.raft.AddVoter(s.id, here, 0, enqueueTimeout).Error() }); err != nil {
			s.log.Warn("could not record this server's new address", "address", here, "error", err)
		}
	}
}

// nameCluster gives the cluster its ID in the state, if it has none: the one that
// its servers met under, or a new one where they have none.
func (s *Store) nameCluster() {
	if s.State().Snapshot().ClusterMeta(nil) != nil {
		return
	}
	id := s.member.cluster()
	setDefault(&id, newUUID())
	ctx, cancel := context.WithTimeout(s.ending, s.cfg.LeaderWait)
	defer cancel()
	if err := s.note(ctx, &cluster.SetClusterMeta{ClusterID: id}); err != nil && s.ending.Err() == nil {
		s.log.Warn("could not name the cluster; the next leader will", "error", err)
	}
	s.poke()
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

// reigns tells of raft's leader, whoever it is.
type reigns struct {
	mu      sync.Mutex
	current context.Context // ends when another begins
	end     context.CancelFunc
}

func (r *reigns) init() { r.current, r.end = context.WithCancel(context.Background()) }

// next ends the current one. Who reigns now is for raft to say.
func (r *reigns) next() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.end()
	r.current, r.end = context.WithCancel(context.Background())
}

func (r *reigns) get() context.Context {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.current
}

// followReigns begins to follow raft's leaders.
func (s *Store) followReigns() {
	news := make(chan raft.Observation, 16)
	observer := raft.NewObserver(news, false, func(o *raft.Observation) bool {
		_, ok := o.Data.(raft.LeaderObservation)
		return ok
	})
	s.raft.RegisterObserver(observer)
	s.ops.Go(func() {
		defer s.reigns.end()
		defer s.raft.DeregisterObserver(observer)
		for {
			select {
			case <-news:
				s.reigns.next()
				s.poke()
			case <-s.closing:
				return
			}
		}
	})
}

// waitLeader gives the leader's ID, which may be this server's own, and a context
// that ends with its reign; when ctx ends first ErrNoLeader, or that the disk is
// full if this is why. This server counts as leader once it has caught up.
func (s *Store) waitLeader(ctx context.Context) (id string, reign context.Context, err error) {
	for {
		if err := s.Err(); err != nil {
			return "", nil, err
		}
		if ctx.Err() != nil {
			return "", nil, s.NoLeader()
		}
		reign := s.reigns.get()
		leader, changed := s.leading.get()
		if leader {
			return string(s.id), reign, nil
		}
		if id, _ := s.Leader(); id != "" && id != string(s.id) {
			return id, reign, nil
		}
		select {
		case <-changed:
		case <-reign.Done():
		case <-s.failed:
		case <-ctx.Done():
		case <-s.closing:
			return "", nil, errClosing
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
		} else if known := s.record(server.ID); known != nil {
			server.Name = known.Name
		}
		out = append(out, server)
	}
	return out, s.fsm.membersIndex(), nil
}
