package raftstore

import (
	"context"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	autopilot "github.com/hashicorp/raft-autopilot"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/raftstore/pb"
)

// Health is the leader's judgement of the cluster's servers.
type Health struct {
	Healthy          bool // all servers are
	FailureTolerance int  // healthy voters that can be lost without losing the quorum
	Leader           string
	Voters           []string // IDs
	Servers          []ServerHealth
}

// ServerHealth is the leader's judgement of one server.
type ServerHealth struct {
	ID, Name, Address, Version string
	Status                     string // as Member's
	Leader, Voter, Healthy     bool
	LastContact                time.Duration // since it heard of the leader, or the leader of it if that is longer; 0 on the leader; negative: never
	LastTerm, LastIndex        uint64        // of its log
	StableSince                time.Time     // when Healthy changed last
}

// Health asks the leader how the servers are. Right after an election that may
// take a moment to be known; Servers is empty then.
func (s *Store) Health(ctx context.Context) (*Health, error) {
	end, err := s.begin()
	if err != nil {
		return nil, err
	}
	defer end()
	return byLeader(ctx, s,
		func() (*Health, error) { return s.healthHere(), nil },
		func(ctx context.Context, _ string, c pb.PeersClient) (*Health, error) {
			reply, err := c.Health(ctx, &pb.Nothing{})
			if err != nil {
				return nil, err
			}
			h := new(Health)
			return h, cluster.Unmarshal(reply.Health, h)
		})
}

func (s *Store) healthHere() *Health {
	state := s.pilot.GetState()
	h := &Health{Healthy: state.Healthy, FailureTolerance: state.FailureTolerance, Leader: string(state.Leader)}
	for _, id := range state.Voters {
		h.Voters = append(h.Voters, string(id))
	}
	for id, v := range state.Servers {
		h.Servers = append(h.Servers, ServerHealth{
			ID: string(id), Name: v.Server.Name, Address: string(v.Server.Address), Version: v.Server.Version, Status: string(v.Server.NodeStatus),
			Leader: v.State == autopilot.RaftLeader, Voter: v.HasVotingRights(), Healthy: v.Health.Healthy,
			LastContact: s.contactOf(v), LastTerm: v.Stats.LastTerm, LastIndex: v.Stats.LastIndex, StableSince: v.Health.StableSince,
		})
	}
	slices.SortFunc(h.Servers, func(a, b ServerHealth) int { return strings.Compare(a.ID, b.ID) })
	return h
}

// contactOf is what a server says itself, and of one that does not answer how long ago
// it did.
func (s *Store) contactOf(v *autopilot.ServerState) time.Duration {
	said := v.Stats.LastContact
	if v.Health.Healthy || v.Server.ID == s.id || said < 0 {
		return said
	}
	met := s.circle.get(string(v.Server.ID)).met
	if met.IsZero() {
		return -1
	}
	return max(said, time.Since(met))
}

// actEvery is how many judgements lie between two acts of autopilot.
const actEvery = 5

// pilot is autopilot, which runs on the leader: it gives new servers their vote
// and removes dead ones.
type pilot struct {
	*autopilot.Autopilot
	promoter autopilot.StablePromoter
}

func (p *pilot) init(s *Store) {
	p.Autopilot = autopilot.New(pilotRaft{s.raft, s}, &pilotView{s},
		autopilot.WithLogger(raftLogger(s.log)), autopilot.WithPromoter(careful{&p.promoter}),
		autopilot.WithUpdateInterval(s.cfg.AutopilotInterval), autopilot.WithReconcileInterval(actEvery*s.cfg.AutopilotInterval))
}

// pilotRaft is raft for autopilot, which waits for each change that it asks for.
type pilotRaft struct {
	*raft.Raft
	store *Store
}

// AddNonvoter implements autopilot.Raft.
func (r pilotRaft) AddNonvoter(id raft.ServerID, addr raft.ServerAddress, prev uint64, timeout time.Duration) raft.IndexFuture {
	return r.settle(func() raft.IndexFuture { return r.Raft.AddNonvoter(id, addr, prev, timeout) })
}

// AddVoter implements autopilot.Raft.
func (r pilotRaft) AddVoter(id raft.ServerID, addr raft.ServerAddress, prev uint64, timeout time.Duration) raft.IndexFuture {
	return r.settle(func() raft.IndexFuture { return r.Raft.AddVoter(id, addr, prev, timeout) })
}

// DemoteVoter implements autopilot.Raft.
func (r pilotRaft) DemoteVoter(id raft.ServerID, prev uint64, timeout time.Duration) raft.IndexFuture {
	return r.settle(func() raft.IndexFuture { return r.Raft.DemoteVoter(id, prev, timeout) })
}

// RemoveServer implements autopilot.Raft.
func (r pilotRaft) RemoveServer(id raft.ServerID, prev uint64, timeout time.Duration) raft.IndexFuture {
	return r.settle(func() raft.IndexFuture { return r.Raft.RemoveServer(id, prev, timeout) })
}

// LeadershipTransferToServer implements autopilot.Raft.
func (r pilotRaft) LeadershipTransferToServer(id raft.ServerID, addr raft.ServerAddress) raft.Future {
	return settled{err: r.store.settle(func() error { return r.Raft.LeadershipTransferToServer(id, addr).Error() })}
}

func (r pilotRaft) settle(ask func() raft.IndexFuture) raft.IndexFuture {
	var index uint64
	err := r.store.settle(func() error {
		future := ask()
		err := future.Error()
		index = future.Index()
		return err
	})
	if err != nil {
		return settled{err: err}
	}
	return settled{index: index}
}

// settled is a future whose answer is there.
type settled struct {
	index uint64
	err   error
}

func (f settled) Index() uint64 { return f.index }
func (f settled) Error() error  { return f.err }

// runPilot runs autopilot while this server leads.
func (s *Store) runPilot() {
	leads := s.LeaderCh(s.ending)
	for leader := range leads {
		if leader {
			s.pilot.Start(s.ending)
			continue
		}
		<-s.pilot.Stop()
	}
	<-s.pilot.Stop()
}

// careful is autopilot's promoter that removes nobody whose absence the others
// could not bear.
type careful struct{ *autopilot.StablePromoter }

// FilterFailedServerRemovals implements autopilot.Promoter. A voter is removed
// only when the healthy voters among the rest are a majority of the rest: else the
// removal could not be agreed on, and the dead server's return would no longer help.
func (careful) FilterFailedServerRemovals(_ *autopilot.Config, state *autopilot.State, failed *autopilot.FailedServers) *autopilot.FailedServers {
	voters, healthy := 0, 0
	for _, v := range state.Servers {
		if v.HasVotingRights() {
			if voters++; v.Health.Healthy {
				healthy++
			}
		}
	}
	keep := *failed
	keep.StaleVoters, keep.FailedVoters = nil, nil
	for _, v := range failed.FailedVoters {
		if voters-1 > 0 && healthy > (voters-1)/2 {
			keep.FailedVoters = append(keep.FailedVoters, v)
			voters--
		}
	}
	return &keep
}

// pilotView is how autopilot sees the store.
type pilotView struct{ *Store }

// AutopilotConfig implements autopilot.ApplicationIntegration.
func (v *pilotView) AutopilotConfig() *autopilot.Config {
	c := v.State().Snapshot().AutopilotConfig(nil)
	return &autopilot.Config{
		CleanupDeadServers: c.CleanupDeadServers, LastContactThreshold: c.LastContactThreshold, MaxTrailingLogs: c.MaxTrailingLogs,
		MinQuorum: c.MinQuorum, ServerStabilizationTime: c.ServerStabilizationTime,
	}
}

// NotifyState implements autopilot.ApplicationIntegration.
func (v *pilotView) NotifyState(*autopilot.State) {}

// KnownServers implements autopilot.ApplicationIntegration: all of raft's
// configuration, registered or not, so that none of them counts as stale.
func (v *pilotView) KnownServers() map[raft.ServerID]*autopilot.Server {
	out := map[raft.ServerID]*autopilot.Server{}
	for _, m := range v.configuration().Servers {
		server := &autopilot.Server{
			ID: m.ID, Address: m.Address, NodeStatus: autopilot.NodeStatus(v.status(string(m.ID))),
			RaftVersion: int(raft.ProtocolVersionMax), IsLeader: m.ID == v.id && v.IsLeader(), NodeType: autopilot.NodeVoter,
		}
		if r := v.record(string(m.ID)); r != nil {
			server.Name, server.Version = r.Name, r.Version
		}
		if m.ID == v.id {
			server.Name, server.Version = v.cfg.Name, v.cfg.Version
		}
		out[m.ID] = server
	}
	return out
}

// FetchServerStats implements autopilot.ApplicationIntegration.
func (v *pilotView) FetchServerStats(ctx context.Context, servers map[raft.ServerID]*autopilot.Server) map[raft.ServerID]*autopilot.ServerStats {
	out := map[raft.ServerID]*autopilot.ServerStats{}
	var mu sync.Mutex
	var asking sync.WaitGroup
	for id := range servers {
		asking.Go(func() {
			in := v.introduce()
			if id != v.id {
				client, err := v.clients.at(v.addrOf(string(id)), string(id))
				if err == nil {
					in, err = client.Meet(ctx, in)
				}
				if err != nil || v.heardFrom(in) != nil {
					return
				}
			}
			mu.Lock()
			defer mu.Unlock()
			out[id] = &autopilot.ServerStats{LastContact: time.Duration(in.LastContact), LastTerm: in.LastTerm, LastIndex: in.LastIndex}
		})
	}
	asking.Wait()
	return out
}

// RemoveFailedServer implements autopilot.ApplicationIntegration. The server may
// come back as a new one.
func (v *pilotView) RemoveFailedServer(server *autopilot.Server) {
	end, closed := v.begin()
	if closed != nil {
		return
	}
	v.ops.Go(func() {
		defer end()
		err := v.spare(string(server.ID))
		if err == nil {
			err = v.settle(func() error { return v.raft.RemoveServer(server.ID, 0, enqueueTimeout).Error() })
		}
		if err != nil {
			v.log.Warn("could not remove a dead server; trying again", "server", server.ID, "error", err)
			return
		}
		v.log.Info("removed a dead server", "server", server.ID, "name", server.Name)
		ctx, cancel := context.WithTimeout(v.ending, v.cfg.LeaderWait)
		defer cancel()
		if err := v.note(ctx, &cluster.RemoveServer{ID: string(server.ID)}); err != nil && v.ending.Err() == nil {
			v.log.Warn("could not forget a dead server's record", "server", server.ID, "error", err)
		}
	})
}
