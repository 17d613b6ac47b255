//go:build !race

// Virtual time and the race detector do not go together yet (golang.org/issue/78156): make test runs these without it.

package fleet

import (
	"testing"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

const many = 40 // nodes of the tests in virtual time

func TestSilentNodeIsNoticedWithinFiveSeconds(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRegion(t, 3, nil)
		s := r.attach(many)
		time.Sleep(7 * time.Second)
		id := s.NodeIDs()[0]
		s.Silence(id, true)
		took := r.until(5*time.Second, "the silent node is down", func() bool { return r.count(cluster.NodeStatusDown) == 1 })
		t.Logf("noticed after %s", took)
		if n := r.any().state.Snapshot().Node(nil, id); n.Status != cluster.NodeStatusDown || n.StatusDescription != "Node heartbeat missed" {
			t.Errorf("node is %s: %s", n.Status, n.StatusDescription)
		}
		if n := r.count(cluster.NodeStatusReady); n != many-1 {
			t.Errorf("%d nodes are ready", n)
		}
		s.Silence(id, false)
		r.until(2*time.Second, "it is back", func() bool { return r.count(cluster.NodeStatusReady) == many })
	})
}

func TestKilledServerCostsNoNode(t *testing.T) {
	for _, killed := range []string{"s2", "s1"} {
		bubble(t, func(t *testing.T) {
			r := newRegion(t, 3, nil)
			s := r.attach(many)
			time.Sleep(7 * time.Second)
			before := r.length()
			r.kill(killed)
			if killed == "s1" {
				r.lead("")
				time.Sleep(1500 * time.Millisecond)
				r.lead("s3")
			}
			r.until(2*time.Second, "all nodes attached again", func() bool { return s.Stats().Attached == many })
			r.neverDown(15*time.Second, many)
			if kinds := r.entries(before); len(kinds) != 0 {
				t.Errorf("nodes that only moved made log entries: %v", kinds)
			}
		})
	}
}

// TestNodeThatDiedWithTheLeader loses the leader and a node at one moment.
func TestNodeThatDiedWithTheLeader(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRegion(t, 3, nil)
		s := r.attach(many)
		time.Sleep(7 * time.Second)
		ids := s.NodeIDs()[:6] // some of them the leader's own
		for _, id := range ids {
			s.Silence(id, true)
		}
		r.kill("s1")
		r.lead("")
		start := time.Now()
		time.Sleep(1200 * time.Millisecond)
		r.lead("s2")
		r.until(5*time.Second, "the nodes are down", func() bool { return r.count(cluster.NodeStatusDown) == len(ids) })
		took := time.Since(start)
		t.Logf("noticed %s after the death, the leader elected after 1.2s", took)
		if took > 5*time.Second {
			t.Errorf("noticed after %s", took)
		}
		if n := r.count(cluster.NodeStatusReady); n != many-len(ids) {
			t.Errorf("%d nodes are ready", n)
		}
	})
}

func TestLeaderChangesCostNoNode(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRegion(t, 3, nil)
		r.attach(many)
		for i := range 8 {
			r.lead("")
			time.Sleep(time.Duration(i) * 300 * time.Millisecond)
			r.lead([]string{"s2", "s3", "s1"}[i%3])
			r.neverDown(time.Duration(i)*time.Second, many)
		}
		r.neverDown(10*time.Second, many)
	})
}

// TestFrozenServerCostsNoNode stops all that a server sends and receives: its nodes
// find out and go elsewhere; when it moves again nothing comes of it.
func TestFrozenServerCostsNoNode(t *testing.T) {
	for _, frozen := range []time.Duration{time.Second, 3 * time.Second, 12 * time.Second} {
		bubble(t, func(t *testing.T) {
			r := newRegion(t, 3, nil)
			s := r.attach(many)
			time.Sleep(7 * time.Second)
			r.members["s2"].freeze()
			r.neverDown(frozen, many)
			if frozen > 4*time.Second && s.Stats().Attached != many {
				t.Errorf("%d of %d nodes found another server", s.Stats().Attached, many)
			}
			r.members["s2"].thaw()
			r.neverDown(15*time.Second, many)
		})
	}
}

// TestServersShareTheNodes takes a server away and back: it gets its share again,
// and nobody misses a node.
func TestServersShareTheNodes(t *testing.T) {
	bubble(t, func(t *testing.T) {
		const nodes = 120
		r := newRegion(t, 3, nil)
		r.attach(nodes)
		time.Sleep(7 * time.Second)
		held := func(id string) int {
			m := r.members[id]
			m.srv.mu.Lock()
			defer m.srv.mu.Unlock()
			return len(m.srv.sessions)
		}
		r.kill("s3")
		r.neverDown(30*time.Second, nodes)
		r.start("s3", nil)
		if n := held("s3"); n > nodes/10 {
			t.Fatalf("the server that was away begins with %d nodes", n)
		}
		r.neverDown(time.Minute, nodes)
		for _, id := range r.ids() {
			if n, most := held(id), nodes/3+nodes/24+balanceSlack; n > most {
				t.Errorf("%s holds %d of %d nodes, over %d", id, n, nodes, most)
			}
		}
		if n := held("s3"); n < nodes/6 {
			t.Errorf("the server that was away holds %d of %d nodes", n, nodes)
		}
	})
}

// TestServerCutOffSendsItsNodesAway parts a server from the others, but not from
// its nodes.
func TestServerCutOffSendsItsNodesAway(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRegion(t, 3, nil)
		s := r.attach(many)
		time.Sleep(7 * time.Second)
		r.cutOff("s3", true)
		r.neverDown(10*time.Second, many)
		m := r.members["s3"]
		m.srv.mu.Lock()
		left := len(m.srv.sessions)
		m.srv.mu.Unlock()
		if left != 0 || s.Stats().Attached != many {
			t.Errorf("%d nodes are left on the server that is cut off, %d are attached", left, s.Stats().Attached)
		}
		r.cutOff("s3", false)
		r.neverDown(10*time.Second, many)
	})
}

// TestLastServerKeepsItsNodes leaves nodes no choice: a server without the others
// still answers calls.
func TestLastServerKeepsItsNodes(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRegion(t, 3, nil)
		s := r.attach(many)
		r.lead("")
		r.kill("s1")
		r.kill("s2")
		time.Sleep(20 * time.Second)
		at := r.length()
		attached := 0
		m := r.members["s3"]
		r.until(20*time.Second, "nodes are held by the last server", func() bool {
			m.srv.mu.Lock()
			defer m.srv.mu.Unlock()
			attached = len(m.srv.sessions)
			return attached == many
		})
		r.change(func() { r.leader = "s3" }) // a majority again
		r.until(10*time.Second, "all nodes attached", func() bool { return s.Stats().Attached == many })
		r.neverDown(10*time.Second, many)
		if kinds := r.entries(at); len(kinds) != 0 {
			t.Errorf("log entries: %v", kinds)
		}
	})
}

// TestStorm silences more nodes at once than may die: they become disconnected, and
// what is paused goes on once they are back.
func TestStorm(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRegion(t, 3, nil)
		s := r.attach(many)
		time.Sleep(7 * time.Second)
		gone := s.NodeIDs()[:many/2]
		for _, id := range gone {
			s.Silence(id, true)
		}
		r.until(6*time.Second, "they are disconnected", func() bool { return r.count(cluster.NodeStatusDisconnected) == len(gone) })
		hold := r.any().state.Snapshot().FleetHold(nil)
		if hold == nil || hold.Nodes != len(gone) || hold.Of != many || hold.Reason == "" {
			t.Fatalf("hold %+v", hold)
		}
		if n := r.any().state.Snapshot().Node(nil, gone[0]); n.StatusDescription != "Node heartbeat missed; replacements pause: "+hold.Reason {
			t.Errorf("a silent node says %q", n.StatusDescription)
		}
		r.lead("s3") // another leader goes on with it
		time.Sleep(20 * time.Second)
		if n := r.count(cluster.NodeStatusDisconnected); n != len(gone) || r.any().state.Snapshot().FleetHold(nil) == nil {
			t.Errorf("%d nodes are disconnected later", n)
		}
		for _, id := range gone[2:] { // two never return
			s.Silence(id, false)
		}
		r.until(15*time.Second, "the hold ends", func() bool { return r.any().state.Snapshot().FleetHold(nil) == nil })
		r.until(10*time.Second, "the rest is down", func() bool { return r.count(cluster.NodeStatusDown) == 2 })
		if n := r.count(cluster.NodeStatusReady); n != many-2 {
			t.Errorf("%d nodes are ready", n)
		}
	})
}

func TestHoldEndsByOperatorAndByTime(t *testing.T) {
	for _, operator := range []bool{true, false} {
		bubble(t, func(t *testing.T) {
			r := newRegion(t, 3, func(c *Config) { c.HoldLimit = time.Minute })
			s := r.attach(many)
			time.Sleep(7 * time.Second)
			for _, id := range s.NodeIDs()[:many/2] {
				s.Silence(id, true)
			}
			r.until(6*time.Second, "they are disconnected", func() bool { return r.count(cluster.NodeStatusDisconnected) == many/2 })
			limit := 65 * time.Second
			if operator {
				if err := r.members["s2"].srv.ReleaseHold(t.Context()); err != nil {
					t.Fatal(err)
				}
				limit = time.Second
			}
			took := r.until(limit, "they are down", func() bool { return r.count(cluster.NodeStatusDown) == many/2 })
			if !operator && took < 55*time.Second {
				t.Errorf("the hold ended after %s", took)
			}
			if r.any().state.Snapshot().FleetHold(nil) != nil {
				t.Error("the hold is still there")
			}
			time.Sleep(10 * time.Second)
			if r.any().state.Snapshot().FleetHold(nil) != nil {
				t.Error("the hold came back")
			}
		})
	}
}

// TestFewNodesNeverHold: of three nodes one may die without further ado.
func TestFewNodesNeverHold(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRegion(t, 1, nil)
		s := r.attach(3)
		time.Sleep(7 * time.Second)
		s.Silence(s.NodeIDs()[0], true)
		s.Silence(s.NodeIDs()[1], true)
		r.until(5*time.Second, "both are down", func() bool { return r.count(cluster.NodeStatusDown) == 2 })
	})
}

// TestRestartOfAllServers: nodes that back off from servers which are away are not
// taken for dead when those return.
func TestRestartOfAllServers(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRegion(t, 3, nil)
		r.attach(many)
		r.lead("")
		for _, id := range r.ids() {
			r.kill(id)
		}
		time.Sleep(time.Minute)
		for _, id := range r.ids() {
			r.start(id, nil)
		}
		r.lead("s1")
		r.neverDown(20*time.Second, many)
	})
}

func TestTTLGrowsWithTheRegion(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRegion(t, 3, func(c *Config) { c.Rate = 5 })
		r.attach(many)
		r.until(time.Second, "the TTL has grown", func() bool {
			const want = many / 5 * time.Second
			return r.members["s1"].srv.TTL() == want && r.members["s3"].srv.TTL() == want
		})
		r.neverDown(20*time.Second, many)
	})
}

// TestSilenceLimit: nodes that are all late are given time; such as are gone are not, be
// they few or most.
func TestSilenceLimit(t *testing.T) {
	const ttl = 4 * time.Second
	silences := func(late, gone int, lateness, silence time.Duration) (all []time.Duration) {
		for i := range 100 {
			switch {
			case i < gone:
				all = append(all, silence)
			case i < gone+late:
				all = append(all, lateness)
			default:
				all = append(all, time.Duration(i)*ttl/4/100)
			}
		}
		return all
	}
	for name, test := range map[string]struct {
		silences []time.Duration
		want     time.Duration
	}{
		"all is well":                {silences(0, 0, 0, 0), ttl},
		"a few are gone":             {silences(0, 20, 0, 5*ttl), ttl},
		"nearly half are gone":       {silences(0, 45, 0, 5*ttl), ttl},
		"most are gone":              {silences(0, 80, 0, ttl+1), ttl},
		"all are late by half a TTL": {silences(100, 0, ttl/2, 0), 2 * ttl},
		"late, and some are gone":    {silences(70, 30, ttl/2, 5*ttl), 2 * ttl},
		"all are late by a TTL":      {silences(100, 0, ttl, 0), maxSilence * ttl},
		"too few to tell":            {silences(100, 0, ttl/2, 0)[:medianNodes-1], ttl},
	} {
		if got := silenceLimit(test.silences, ttl); got != test.want {
			t.Errorf("%s: %s, want %s", name, got, test.want)
		}
	}
}
