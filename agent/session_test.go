package agent

import (
	"testing"
	"time"
)

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
