package raftstore

import (
	"context"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/rxvision/rxvision/raftstore/pb"
)

// Raft's timers are calm: a follower waits a second and more before it campaigns,
// so that no busy machine loses its leader. But a process that was killed leaves a
// sign: its connections break, and its port refuses new ones. A follower that sees
// this asks the other voters whether they do, too; when a majority does, the one
// with the longest log campaigns at once. It then does what the leader would have
// told it to do on a hand-over (raft's TimeoutNow). A wrong guess costs an
// election, and can do no other harm.
const (
	probeTimeout = 500 * time.Millisecond
	probeTries   = 3
	probePause   = 10 * time.Millisecond
	// heirWait is how long the others give the best candidate.
	heirWait = 150 * time.Millisecond
	// exitWait is how long a dying process is first given to close its port, then
	// twice that and so on: the kernel closes what a large one had open over many
	// milliseconds, in any order.
	exitWait = 25 * time.Millisecond
	// heirTime bounds all attempts; after it raft's own timers have fired.
	heirTime = 750 * time.Millisecond
)

// lostConnection hears that a raft connection of that server has broken.
func (s *Store) lostConnection(id string) {
	leader, addr := s.Leader()
	if id != leader || id == string(s.id) {
		return
	}
	end, err := s.begin()
	if err != nil {
		return
	}
	if !s.succeeding.TryLock() {
		end()
		return
	}
	s.ops.Go(func() {
		defer end()
		defer s.succeeding.Unlock()
		s.succeed(leader, addr)
	})
}

// succeed finds out whether the leader is dead, and who is to follow it.
func (s *Store) succeed(leader, addr string) {
	ctx, cancel := context.WithTimeout(s.ending, heirTime)
	defer cancel()
	for pause := exitWait; ctx.Err() == nil && s.follows(leader); pause *= 2 {
		reign, wait := s.reigns.get(), pause
		if s.leaderGone(ctx, leader, addr) {
			gone, heir := s.askWitnesses(ctx, leader, addr)
			if gone {
				wait = heirWait
			}
			if gone && heir {
				s.log.Warn("the leader's process is gone; campaigning", "server", leader, "address", addr)
				s.campaign()
			}
		}
		select {
		case <-time.After(wait):
		case <-reign.Done():
		case <-ctx.Done():
		}
	}
}

// follows says whether this server knows of no leader but that one.
func (s *Store) follows(leader string) bool {
	now, _ := s.Leader()
	return (now == leader || now == "") && leader != string(s.id)
}

// leaderGone says whether this server, too, takes the leader for dead: it has no
// other one, and nobody listens at its port.
func (s *Store) leaderGone(ctx context.Context, leader, addr string) bool {
	return s.follows(leader) && s.port.probe(ctx, addr)
}

// askWitnesses asks the other voters. gone means that a majority, this server
// included, takes the leader for dead; heir that none of these has a longer log
// than this one, or as long a one and a lower ID.
func (s *Store) askWitnesses(ctx context.Context, leader, addr string) (gone, heir bool) {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	index, term := s.lastLog()
	voters, agree, vote := 0, 0, false
	var mu sync.Mutex
	var asking sync.WaitGroup
	heir = true
	for _, m := range s.configuration().Servers {
		if m.Suffrage != raft.Voter {
			continue
		}
		voters++
		if m.ID == s.id {
			vote = true
			mu.Lock()
			agree++
			mu.Unlock()
			continue
		}
		if string(m.ID) == leader {
			continue
		}
		asking.Go(func() {
			client, err := s.clients.at(s.addrOf(string(m.ID)), string(m.ID))
			if err != nil {
				return
			}
			w, err := client.Witness(ctx, &pb.WitnessRequest{LeaderId: leader, LeaderAddr: addr})
			if err != nil || !w.Gone {
				return
			}
			mu.Lock()
			defer mu.Unlock()
			agree++
			if w.LastTerm != term {
				heir = heir && w.LastTerm < term
			} else if w.LastIndex != index {
				heir = heir && w.LastIndex < index
			} else {
				heir = heir && s.id < m.ID
			}
		})
	}
	asking.Wait()
	return vote && agree > voters/2, heir
}

// campaign makes this server a candidate now.
func (s *Store) campaign() {
	if s.raft.State() == raft.Leader || !s.disk.state().OK {
		return
	}
	request := raft.TimeoutNowRequest{RPCHeader: raft.RPCHeader{
		ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(s.id), Addr: []byte(s.trans.LocalAddr()),
	}}
	if err := s.trans.TimeoutNow(s.id, s.trans.LocalAddr(), &request, &raft.TimeoutNowResponse{}); err != nil && !s.isClosing() {
		s.log.Warn("cannot campaign before raft's own time", "error", err)
	}
}

// campaignAlone campaigns when this server is the only voter: nobody else can be
// heard, so nothing is gained by waiting.
func (s *Store) campaignAlone() {
	end, err := s.begin()
	if err != nil {
		return
	}
	s.ops.Go(func() {
		defer end()
		pauseFor(s.ending, retryPause)
		voters := 0
		own := false
		for _, m := range s.configuration().Servers {
			if m.Suffrage == raft.Voter {
				voters++
				own = own || m.ID == s.id
			}
		}
		if own && voters == 1 && s.raft.State() == raft.Follower {
			s.campaign()
		}
	})
}

// stepAside hands the leadership over before this server ends, if there is
// someone to take it.
func (s *Store) stepAside() {
	if s.Err() != nil || s.raft.State() != raft.Leader {
		return
	}
	for _, m := range s.configuration().Servers {
		if m.Suffrage == raft.Voter && m.ID != s.id && s.status(string(m.ID)) == MemberAlive {
			if err := s.settle(func() error { return s.raft.LeadershipTransfer().Error() }); err != nil {
				s.log.Warn("could not hand the leadership over before the end", "error", err)
			}
			return
		}
	}
}
