package raftstore

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/grpc/status"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/raftstore/pb"
)

// Bounds of what goes to the leader together.
const (
	convoyCalls   = 2 // under way; what comes meanwhile waits for the next
	convoyEntries = 256
	convoyBytes   = 2 << 20
)

// convoy takes entries to the leader, as many in one call as have come since the
// last ones began: the busier the server, the fewer calls for each entry.
type convoy struct {
	mu      sync.Mutex
	waiting []*parcel
	calls   int
}

// parcel is an entry on its way.
type parcel struct {
	ctx    context.Context // of who waits for it
	leader string
	client pb.PeersClient
	entry  []byte
	answer chan outcome // takes one without blocking
}

// carry brings an entry to the leader. The error is gRPC's when the leader has not
// answered it.
func (s *Store) carry(ctx context.Context, leader string, client pb.PeersClient, entry []byte) (cluster.Result, error) {
	p := &parcel{ctx: ctx, leader: leader, client: client, entry: entry, answer: make(chan outcome, 1)}
	s.convoy.mu.Lock()
	s.convoy.waiting = append(s.convoy.waiting, p)
	begin := s.convoy.calls < convoyCalls
	if begin {
		s.convoy.calls++
	}
	s.convoy.mu.Unlock()
	if begin {
		s.ops.Go(func() {
			for batch := s.convoy.next(); batch != nil; batch = s.convoy.next() {
				s.deliver(batch)
			}
		})
	}
	select {
	case out := <-p.answer:
		return out.Result, out.err
	case <-ctx.Done():
		return cluster.Result{}, status.FromContextError(ctx.Err()).Err()
	}
}

// next gives the oldest parcels, all for one leader; nil ends a call's turn.
func (c *convoy) next() (batch []*parcel) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var rest []*parcel
	size := 0
	for _, p := range c.waiting {
		switch {
		case p.ctx.Err() != nil: // nobody waits for it
		case len(batch) > 0 && (p.leader != batch[0].leader || size+len(p.entry) > convoyBytes || len(batch) == convoyEntries):
			rest = append(rest, p)
		default:
			batch, size = append(batch, p), size+len(p.entry)
		}
	}
	c.waiting = rest
	if batch == nil {
		c.calls--
	}
	return batch
}

// deliver makes one call and answers its parcels. It ends early when nobody waits
// for any of them.
func (s *Store) deliver(batch []*parcel) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var left atomic.Int32
	left.Store(int32(len(batch)))
	in := &pb.Entries{}
	for _, p := range batch {
		in.Entries = append(in.Entries, p.entry)
		defer context.AfterFunc(p.ctx, func() {
			if left.Add(-1) == 0 {
				cancel()
			}
		})()
	}
	reply, err := batch[0].client.Apply(ctx, in)
	if err == nil {
		if len(reply.Outcomes) != len(batch) {
			err = errors.New("the leader has answered other entries than it was given")
		}
		s.hear(batch[0].leader, reply.Commit)
	}
	for i, p := range batch {
		out := outcome{err: err}
		if err == nil {
			out = opened(reply.Outcomes[i])
		}
		p.answer <- out
	}
}

// opened reads an outcome that packed wrote.
func opened(o *pb.Outcome) (out outcome) {
	if o.Code != "" {
		out.err = &cluster.Error{Code: cluster.Code(o.Code), Text: o.Text}
	} else {
		out.err = cluster.Unmarshal(o.Result, &out.Result)
	}
	return out
}

func packed(out outcome) *pb.Outcome {
	if out.err != nil {
		return &pb.Outcome{Code: string(cluster.CodeOf(out.err)), Text: out.err.Error()}
	}
	return &pb.Outcome{Result: cluster.Marshal(out.Result)}
}

// Apply implements pb.PeersServer.
func (s *service) Apply(ctx context.Context, in *pb.Entries) (*pb.Applied, error) {
	return onlyLeader(s.Store, func() (*pb.Applied, error) {
		reply := &pb.Applied{Outcomes: make([]*pb.Outcome, len(in.Entries))}
		var entries [][]byte
		var at []int // their places
		for i, e := range in.Entries {
			if err := acceptable(e); err != nil {
				reply.Outcomes[i] = packed(outcome{err: err})
				continue
			}
			entries, at = append(entries, e), append(at, i)
		}
		outcomes, err := s.applyHere(ctx, entries)
		if err != nil {
			return nil, err
		}
		for n, out := range outcomes {
			reply.Outcomes[at[n]] = packed(out)
		}
		reply.Commit = s.committed()
		return reply, nil
	})
}

// acceptable checks an entry that another server has sealed.
func acceptable(sealed []byte) error {
	entry, err := unseal(sealed)
	if err != nil {
		return cluster.Errorf(cluster.CodeInvalid, "forwarded write: %v", err)
	}
	// A kind that this version does not know would stop every server that applies it.
	if _, err := cluster.DecodeCommand([]byte{entry[0], 0x80}); err != nil {
		return cluster.Errorf(cluster.CodeUnsupported, "the leader is of an older version: %v", err)
	}
	return nil
}

// committed is the last entry that this leader has applied.
func (s *Store) committed() *pb.Commit {
	c := &pb.Commit{Term: s.raft.CurrentTerm()}
	c.Index, c.IndexTerm = s.fsm.applied()
	return c
}

// hearsay is the newest that the leader has said of what is committed.
type hearsay struct {
	mu      sync.Mutex
	leader  string
	commit  *pb.Commit // nil: raft has been told
	telling bool
}

// hear has raft told what is committed, when the leader has said so with an answer:
// raft's own message may take CommitTimeout more.
func (s *Store) hear(leader string, c *pb.Commit) {
	if c.GetIndex() == 0 || c.Index <= s.raft.CommitIndex() {
		return
	}
	h := &s.hearsay
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.commit == nil || h.commit.Index < c.Index || h.leader != leader {
		h.leader, h.commit = leader, c
	}
	if !h.telling {
		h.telling = true
		s.ops.Go(func() {
			for leader, c := h.next(); c != nil; leader, c = h.next() {
				s.tellRaft(leader, c)
			}
		})
	}
}

func (h *hearsay) next() (leader string, c *pb.Commit) {
	h.mu.Lock()
	defer h.mu.Unlock()
	leader, c, h.commit = h.leader, h.commit, nil
	h.telling = c != nil
	return leader, c
}

// tellRaft says to raft here what the leader would: a message without entries, with
// its commit index. Raft takes it only if its log has the entry, of the same term,
// so that nothing but what is committed can be applied by it.
func (s *Store) tellRaft(leader string, c *pb.Commit) {
	late := time.NewTimer(s.commitTimeout()) // then raft knows by itself
	defer late.Stop()
	if !s.disk.reaches(c.Index, late.C) {
		return
	}
	addr, id := s.raft.LeaderWithID()
	if string(id) != leader || s.raft.CurrentTerm() != c.Term || s.raft.CommitIndex() >= c.Index {
		return
	}
	err := s.trans.AppendEntries(s.id, s.trans.LocalAddr(), &raft.AppendEntriesRequest{
		RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(id), Addr: []byte(addr)},
		Term:      c.Term, PrevLogEntry: c.Index, PrevLogTerm: c.IndexTerm, LeaderCommitIndex: c.Index,
	}, &raft.AppendEntriesResponse{})
	if err != nil && !s.isClosing() {
		s.log.Debug("raft did not take the news of a commit", "index", c.Index, "error", err)
	}
}
