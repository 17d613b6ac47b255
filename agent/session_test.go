package agent

import (
	"testing"
	"time"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
)

// TestHelloSaysWhatIsKnown: an agent that comes again names what it was told and has
// stored, and nothing of a timeline that it has heard of only in part.
func TestHelloSaysWhatIsKnown(t *testing.T) {
	s := newFleetServer(t)
	s.timeline = "one"
	startAgent(t, testConfig(t, s))
	hello := func(hellos int) *pb.Hello {
		t.Helper()
		s.wait(t, "a hello", func() bool { return s.hellos == hellos && s.out != nil })
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.hello
	}
	again := func(hellos int) *pb.Hello {
		t.Helper()
		s.change(func() { s.out = nil; s.hangUp() })
		return hello(hellos)
	}
	if h := hello(1); h.Timeline != "" || len(h.Known) != 0 {
		t.Errorf("a new agent knows %v", h)
	}
	j, alloc := service(t, onnxTask("m", s.model("a model")))
	alloc.AllocModifyIndex = 7
	s.run(j, alloc)
	s.waitStatus(t, alloc.ID, cluster.AllocClientRunning)
	if h := again(2); h.Timeline != "one" || len(h.Known) != 1 || h.Known[0].Id != alloc.ID || h.Known[0].Index != 7 {
		t.Errorf("an agent that was told of an allocation knows %v", h)
	}
	s.edit(alloc.ID, func(a *cluster.Allocation) { a.AllocModifyIndex, a.DesiredStatus = 8, cluster.AllocDesiredStop })
	s.waitStatus(t, alloc.ID, cluster.AllocClientComplete)
	if h := again(3); len(h.Known) != 1 || h.Known[0].Index != 8 {
		t.Errorf("after a change it knows %v", h)
	}
	second := *alloc
	second.ID, second.AllocModifyIndex, second.DesiredStatus = newUUID(), 9, cluster.AllocDesiredStop
	s.want(func() { s.timeline, s.allocs = "two", map[string]*cluster.Allocation{second.ID: &second} })
	s.wait(t, "word of it", func() bool { return s.reported[second.ID] != nil })
	if h := again(4); h.Timeline != "" {
		t.Errorf("an agent that has heard a part of another timeline knows %v", h)
	}
	s.want(func() { s.allocs = nil }, second.ID) // again(4) was told everything
	for n := 5; ; n++ {                          // it may hang up before it has heard
		if h := again(n); h.Timeline == "two" && len(h.Known) == 0 {
			break
		}
	}
}

// TestSilentServerIsLeft freezes the server that an agent is attached to: its
// connection stays, but nothing comes. The agent goes to the other one, which
// answers.
func TestSilentServerIsLeft(t *testing.T) {
	a, b := newFleetServer(t), newFleetServer(t)
	a.replies, b.replies = true, true
	cfg := testConfig(t, a)
	cfg.Servers = []string{a.address, b.address}
	startAgent(t, cfg)
	attached := func(s *fleetServer) bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.out != nil
	}
	waitFor(t, "a server to have the agent", func() bool { return attached(a) || attached(b) })
	if attached(b) {
		a, b = b, a
	}
	a.change(func() { a.silent = true })
	b.wait(t, "the agent on the other server", func() bool { return b.out != nil })
	a.wait(t, "the silent server to be left", func() bool { return a.out == nil })
}

// TestRefusedAgentTakesAnyServer: an agent that every server refused says so.
func TestRefusedAgentTakesAnyServer(t *testing.T) {
	s := newFleetServer(t)
	s.refuse = 2
	startAgent(t, testConfig(t, s))
	s.wait(t, "the agent", func() bool { return s.out != nil })
	if !s.any {
		t.Error("the agent was refused twice by its only server, and asked for another one again")
	}
}

func TestRetriesGrowAndAreSpread(t *testing.T) {
	for _, ttl := range []time.Duration{0, 3500 * time.Millisecond, time.Hour} {
		most := maxBackoff
		if ttl == 3500*time.Millisecond {
			most = ttl / 2
		}
		spread := map[time.Duration]bool{}
		for tries := range 30 {
			at := attempt{tries: tries, ttl: ttl}
			wait := at.pause()
			spread[wait] = true
			if wait < 0 || wait > most || tries == 0 && wait > minBackoff || tries > 10 && wait < most/2 {
				t.Errorf("TTL %s, after %d attempts in vain: the wait is %s", ttl, tries, wait)
			}
			if p := at.patience(); p > maxHelloWait || tries == 0 && (p == quickHello) != (ttl > 0) {
				t.Errorf("TTL %s, after %d attempts in vain: a welcome is awaited for %s", ttl, tries, p)
			}
		}
		if len(spread) < 20 {
			t.Errorf("30 waits have %d lengths", len(spread))
		}
	}
}
