package raftstore

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	autopilot "github.com/hashicorp/raft-autopilot"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/raftstore/pb"
)

// Member is a server as operators see it.
type Member struct {
	ID, Name, Region, Datacenter string
	RaftAddr, RPCAddr, HTTPAddr  string // host:port
	Version                      string
	Status                       string // MemberAlive, MemberFailed or MemberLeft, as this server sees it
	Voter, Leader                bool
}

// The states of a Member.
const (
	MemberAlive  = "alive"
	MemberFailed = "failed"
	MemberLeft   = "left"
)

// configuration is the newest Raft configuration, committed or not.
func (s *Store) configuration() raft.Configuration {
	return s.raft.GetConfiguration().Configuration()
}

func (s *Store) inConfiguration(id raft.ServerID) bool {
	return s.raft != nil && slices.ContainsFunc(s.configuration().Servers, func(m raft.Server) bool { return m.ID == id })
}

// record is what is known of a server: what it said last, or the state's record.
func (s *Store) record(id string) *cluster.Server {
	if a := s.circle.get(id); a.server != nil {
		return a.server
	}
	return s.State().Snapshot().Server(nil, id)
}

// addrOf is the Raft address of a server: where it answered last, else as
// registered; "" when it is not known.
func (s *Store) addrOf(id string) string {
	a := s.circle.get(id)
	if a.addr != "" && !a.gone {
		return a.addr
	}
	for _, m := range s.configuration().Servers {
		if string(m.ID) == id {
			return string(m.Address)
		}
	}
	return a.addr
}

// ServerAddr implements raft.ServerAddressProvider: raft reaches a server where
// it is now, and only that server.
func (s *Store) ServerAddr(id raft.ServerID) (raft.ServerAddress, error) {
	if id == s.id || s.raft == nil {
		return s.trans.LocalAddr(), nil
	}
	addr := s.addrOf(string(id))
	if addr == "" {
		return "", fmt.Errorf("the address of server %s is not known", id)
	}
	return raft.ServerAddress(string(id) + "@" + addr), nil
}

// lastLog is where this server's log ends.
func (s *Store) lastLog() (index, term uint64) {
	stats := s.raft.Stats()
	index, _ = strconv.ParseUint(stats["last_log_index"], 10, 64) // raft's own figures
	term, _ = strconv.ParseUint(stats["last_log_term"], 10, 64)
	return index, term
}

// status says how a server is, as far as this one has seen.
func (s *Store) status(id string) string {
	if id == string(s.id) {
		return MemberAlive
	}
	if r := s.State().Snapshot().Server(nil, id); r != nil && r.Left && !s.inConfiguration(raft.ServerID(id)) {
		return MemberLeft
	}
	if s.circle.silence(id) > s.cfg.FailedAfter {
		return MemberFailed
	}
	return MemberAlive
}

// silence is how long a server has not been met. One that was never met counts
// from when it was first asked after.
func (c *circle) silence(id string) time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	a := c.byID[id]
	if a == nil {
		if len(c.byID) >= maxAcquaintances {
			c.forgetOldest()
		}
		a = &acquaintance{id: id, first: time.Now()}
		c.byID[id] = a
	}
	if a.met.IsZero() {
		return time.Since(a.first)
	}
	return time.Since(a.met)
}

// Members lists the servers of the cluster and those that left it lately, by
// name and ID.
func (s *Store) Members() []Member {
	members := map[string]*Member{}
	leader, _ := s.Leader()
	get := func(id string) *Member {
		m := members[id]
		if m == nil {
			m = &Member{ID: id, Status: s.status(id), Leader: id == leader}
			r := s.record(id)
			if id == string(s.id) {
				r = s.self()
			}
			if r != nil {
				m.Name, m.Region, m.Datacenter, m.Version = r.Name, r.Region, r.Datacenter, r.Version
				m.RaftAddr, m.RPCAddr, m.HTTPAddr = r.RaftAddr, r.RPCAddr, r.HTTPAddr
			}
			members[id] = m
		}
		return m
	}
	for _, c := range s.configuration().Servers {
		m := get(string(c.ID))
		m.Voter = c.Suffrage == raft.Voter
		setDefault(&m.RaftAddr, string(c.Address))
	}
	for _, r := range s.State().Snapshot().Servers(nil) {
		get(r.ID)
	}
	out := make([]Member, 0, len(members))
	for _, m := range members {
		out = append(out, *m)
	}
	slices.SortFunc(out, func(a, b Member) int {
		if c := strings.Compare(a.Name, b.Name); c != 0 {
			return c
		}
		return strings.Compare(a.ID, b.ID)
	})
	return out
}

// notFound is in Nomad's words.
func notFound(id string) error {
	return cluster.Errorf(cluster.CodeNotFound, "id %q was not found in the Raft configuration", id)
}

// RemoveServer takes a server out of the cluster. A server that is removed while
// it runs joins again only after a restart. It is refused when too few of the
// remaining voters would be there to agree on anything.
func (s *Store) RemoveServer(ctx context.Context, id string) error {
	return s.administer(ctx, func() error { return s.removeHere(id) },
		func(ctx context.Context, c pb.PeersClient) error {
			_, err := c.Remove(ctx, &pb.RemoveRequest{Id: id})
			return err
		})
}

// TransferLeadership hands the leadership to a voter, "" for any. It returns when
// this server sees the new leader.
func (s *Store) TransferLeadership(ctx context.Context, id string) error {
	before, _ := s.Leader()
	err := s.administer(ctx, func() error { return s.transferHere(id) },
		func(ctx context.Context, c pb.PeersClient) error {
			_, err := c.Transfer(ctx, &pb.TransferRequest{Id: id})
			return err
		})
	if err != nil {
		return err
	}
	wait, cancel := context.WithTimeout(ctx, s.cfg.LeaderWait)
	defer cancel()
	for {
		leader, _, err := s.waitLeader(wait)
		if err != nil {
			return err
		}
		if leader == id || id == "" && leader != before {
			return nil
		}
		if !pauseFor(wait, retryPause) {
			return cluster.Errorf(cluster.CodeUnavailable, "the leadership was handed over, but this server has not heard of the new leader")
		}
	}
}

// Leave takes this server out of the cluster for good; the caller closes the store
// then. A leader hands its leadership over first. The last voter cannot leave.
func (s *Store) Leave(ctx context.Context) error {
	err := s.RemoveServer(ctx, string(s.id))
	if cluster.CodeOf(err) == cluster.CodeNotFound {
		return nil // it was out already
	}
	return err
}

// administer has the leader do something.
func (s *Store) administer(ctx context.Context, here func() error, there func(context.Context, pb.PeersClient) error) error {
	end, err := s.begin()
	if err != nil {
		return err
	}
	defer end()
	_, err = byLeader(ctx, s,
		func() (struct{}, error) { return struct{}{}, here() },
		func(ctx context.Context, _ string, c pb.PeersClient) (struct{}, error) {
			return struct{}{}, there(ctx, c)
		})
	return err
}

// spare says whether the cluster could go on without a server: a majority of the
// voters that remain must answer now. A removal that they could not agree on would
// stand in the way of the others even when they come back.
func (s *Store) spare(id string) error {
	remain, voter := 0, false
	servers := s.configuration().Servers
	answered := make(chan bool, len(servers))
	var asking sync.WaitGroup
	for _, m := range servers {
		switch {
		case m.Suffrage != raft.Voter:
			continue
		case string(m.ID) == id:
			voter = true
			continue
		}
		remain++
		asking.Go(func() { answered <- m.ID == s.id || s.meet(s.addrOf(string(m.ID)), string(m.ID)) == nil })
	}
	if !voter {
		return nil
	}
	if remain == 0 {
		return cluster.Errorf(cluster.CodeConflict, "server %s is the only voter: without it the cluster is gone", id)
	}
	asking.Wait()
	alive := 0
	for range remain {
		if <-answered {
			alive++
		}
	}
	if alive <= remain/2 {
		return cluster.Errorf(cluster.CodeConflict,
			"without server %s the cluster would have %d voters of which %d answer: too few to agree on anything", id, remain, alive)
	}
	return nil
}

// removeHere is the leader's part of RemoveServer. Once begun it is carried
// through: the server that asks may be the one that is cut off by it.
func (s *Store) removeHere(id string) error {
	ctx, cancel := context.WithTimeout(s.ending, s.cfg.LeaderWait)
	defer cancel()
	if !s.inConfiguration(raft.ServerID(id)) {
		if r := s.State().Snapshot().Server(nil, id); r == nil || r.Left {
			return notFound(id)
		}
		return s.noteLeft(ctx, id)
	}
	if err := s.spare(id); err != nil {
		return err
	}
	if id == string(s.id) {
		if err := s.transferHere(""); err != nil {
			return err
		}
		return cluster.ErrNoLeader // the next leader does it
	}
	s.removing.Store(id, true) // until the state knows, it may ask to come back
	defer s.removing.Delete(id)
	err := s.settle(func() error { return s.raft.RemoveServer(raft.ServerID(id), 0, enqueueTimeout).Error() })
	if err != nil {
		return s.raftError("remove server "+id, err)
	}
	s.log.Info("removed a server", "server", id)
	return s.noteLeft(ctx, id)
}

func (s *Store) noteLeft(ctx context.Context, id string) error {
	start := ""
	if a := s.circle.get(id); a.server != nil {
		start = a.server.Start
	}
	return s.note(ctx, &cluster.RemoveServer{ID: id, Left: true, Start: start})
}

// transferHere is the leader's part of TransferLeadership.
func (s *Store) transferHere(id string) error {
	if id == string(s.id) {
		return nil
	}
	if id == "" {
		return s.raftError("transfer leadership", s.settle(func() error { return s.raft.LeadershipTransfer().Error() }))
	}
	for _, m := range s.configuration().Servers {
		if string(m.ID) != id {
			continue
		}
		if m.Suffrage != raft.Voter {
			return cluster.Errorf(cluster.CodeConflict, "server %s has no vote yet and cannot lead", id)
		}
		err := s.settle(func() error { return s.raft.LeadershipTransferToServer(m.ID, m.Address).Error() })
		return s.raftError("transfer leadership", err)
	}
	return notFound(id)
}

// raftError gives raft's error a code.
func (s *Store) raftError(what string, err error) error {
	switch {
	case err == nil:
		return nil
	case s.Err() != nil:
		return s.Err()
	case errors.Is(err, raft.ErrRaftShutdown), errors.Is(err, errClosing):
		return errClosing
	case lostLeader(err):
		return cluster.ErrNoLeader
	}
	return cluster.Errorf(cluster.CodeUnavailable, "%s: %v", what, err)
}

// addServer is the leader's part of a server's joining: it begins without a vote,
// which autopilot gives it once it has caught up. One that is a member already
// gets its new address.
func (s *Store) addServer(ctx context.Context, server *cluster.Server) error {
	if server.ID == "" || server.RaftAddr == "" || server.Region != s.cfg.Region {
		return cluster.Errorf(cluster.CodeInvalid, "a server of region %q with an ID and an address can join, not %+v", s.cfg.Region, *server)
	}
	if _, leaving := s.removing.Load(server.ID); leaving {
		return cluster.Errorf(cluster.CodeUnavailable, "server %s is being removed", server.ID)
	}
	if old := s.State().Snapshot().Server(nil, server.ID); old != nil && old.Left && old.Start == server.Start && old.Start != "" {
		return cluster.Errorf(cluster.CodeForbidden, "server %s has left the cluster or was removed from it; restart it to let it join again", server.ID)
	}
	if inUse := s.State().Snapshot().Rules(); server.Rules < inUse {
		return cluster.Errorf(cluster.CodeInvalid,
			"server %s runs rxvision %s, which does not know how the log here is to be applied (version %d of the rules; it knows %d); upgrade it", server.Name, server.Version, inUse, server.Rules)
	}
	err := s.pilot.AddServer(&autopilot.Server{ID: raft.ServerID(server.ID), Name: server.Name, Address: raft.ServerAddress(server.RaftAddr)})
	if err != nil {
		return s.raftError("add server "+server.ID, err)
	}
	known := *server
	known.Start = ""
	return s.note(ctx, &cluster.RegisterServer{Server: &known})
}
