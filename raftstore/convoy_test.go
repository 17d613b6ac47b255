package raftstore

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/raftstore/pb"
)

// fakeLeader holds calls up until they are released.
type fakeLeader struct {
	pb.PeersClient
	calls   chan []string // the entries of each
	release chan struct{}
}

func (f *fakeLeader) Apply(ctx context.Context, in *pb.Entries, _ ...grpc.CallOption) (*pb.Applied, error) {
	var entries []string
	reply := &pb.Applied{}
	for i, e := range in.Entries {
		entries = append(entries, string(e))
		out := outcome{Result: cluster.Result{Index: uint64(len(e)), EvalID: string(e)}}
		if i == 1 {
			out = outcome{err: cluster.Errorf(cluster.CodeUnsupported, "not this one")}
		}
		reply.Outcomes = append(reply.Outcomes, packed(out))
	}
	f.calls <- entries
	select {
	case <-f.release:
		return reply, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// TestConvoy has entries go to the leader together, each with an outcome of its own.
func TestConvoy(t *testing.T) {
	s := &Store{}
	leader := &fakeLeader{calls: make(chan []string, 10), release: make(chan struct{})}
	type answer struct {
		cluster.Result
		err error
	}
	answers := map[string]chan answer{}
	carry := func(ctx context.Context, entry string) {
		own := make(chan answer, 1)
		answers[entry] = own
		s.ops.Go(func() {
			res, err := s.carry(ctx, "leader", leader, []byte(entry))
			own <- answer{res, err}
		})
	}
	waiting := func(n int) {
		eventually(t, fmt.Sprintf("%d entries wait", n), func() bool {
			s.convoy.mu.Lock()
			defer s.convoy.mu.Unlock()
			return len(s.convoy.waiting) == n
		})
	}
	for i := range convoyCalls {
		carry(t.Context(), fmt.Sprintf("first-%d", i))
		if got := <-leader.calls; len(got) != 1 {
			t.Fatalf("a call with %q", got)
		}
	}
	gone, cancel := context.WithCancel(t.Context())
	carry(gone, "given-up")
	waiting(1)
	cancel()
	if a := <-answers["given-up"]; !unreachable(a.err) {
		t.Fatalf("given up: %+v", a)
	}
	for i, entry := range []string{"a", "b", "c"} {
		carry(t.Context(), entry)
		waiting(i + 2)
	}
	leader.release <- struct{}{}
	if got := <-leader.calls; !slices.Equal(got, []string{"a", "b", "c"}) {
		t.Fatalf("together went %q", got)
	}
	for range convoyCalls {
		leader.release <- struct{}{}
	}
	for entry, want := range map[string]string{"first-0": "", "a": "", "b": "not this one", "c": ""} {
		a := <-answers[entry]
		switch {
		case want == "" && (a.err != nil || a.EvalID != entry):
			t.Errorf("%s: %+v", entry, a)
		case want != "" && (cluster.CodeOf(a.err) != cluster.CodeUnsupported || a.err.Error() != want):
			t.Errorf("%s: %v", entry, a.err)
		}
	}
	// A call ends when nobody waits for it any more.
	gone, cancel = context.WithCancel(t.Context())
	carry(gone, "alone")
	<-leader.calls
	cancel()
	<-answers["alone"]
	s.ops.Wait()
	if s.convoy.calls != 0 {
		t.Errorf("%d calls are counted when none is under way", s.convoy.calls)
	}
}

// TestHearsay has raft's own news of commits come too late: only the leader's
// answers can tell a follower.
func TestHearsay(t *testing.T) {
	t.Parallel()
	g := newGroup(t)
	g.grow(3)
	for _, s := range slices.Clone(g.all) {
		g.again(s, func(c *Config) { c.commit = 10 * time.Minute })
	}
	leader := g.leader()
	var followers []*Store
	for _, s := range g.all {
		if s != leader {
			followers = append(followers, s)
		}
	}
	mustApply(t, followers[0], register("heard"))
	if !hasJob(followers[0], "heard") {
		t.Error("a follower does not see its own write")
	}
	if err := followers[1].ReadIndex(t.Context(), false); err != nil || !hasJob(followers[1], "heard") {
		t.Errorf("a follower does not see another's write: %v", err)
	}
}

// TestManyWriters writes at all servers at once; each must see what it wrote.
func TestManyWriters(t *testing.T) {
	t.Parallel()
	g := newGroup(t)
	g.grow(3)
	const writers, each = 30, 10
	var group sync.WaitGroup
	for w := range writers {
		s := g.all[w%len(g.all)]
		group.Go(func() {
			for i := range each {
				id := fmt.Sprintf("job-%d-%d", w, i)
				res, err := s.Apply(t.Context(), register(id))
				if err != nil {
					t.Errorf("%s: %v", id, err)
					return
				}
				if j := s.State().Snapshot().Job(nil, cluster.JobKey{Namespace: cluster.DefaultNamespace, ID: id}); j == nil || j.CreateIndex != res.Index {
					t.Errorf("%s: written at %d, seen as %+v", id, res.Index, j)
				}
			}
		})
	}
	group.Wait()
	g.agree()
	if n := len(g.all[0].State().Snapshot().Jobs(nil, "*", "")); n != writers*each {
		t.Errorf("%d jobs", n)
	}
}
