package raftstore

import (
	"testing"

	"github.com/rxvision/rxvision/cluster"
)

func TestHealth(t *testing.T) {
	t.Parallel()
	g := newGroup(t)
	g.grow(3)
	s := g.follower()
	eventually(t, "all are healthy", func() bool {
		h, err := s.Health(t.Context())
		return err == nil && h.Healthy && h.FailureTolerance == 1 && len(h.Servers) == 3 && len(h.Voters) == 3 && h.Leader == g.leader().ID()
	})
	h, err := s.Health(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range h.Servers {
		if v.Name == "" || v.Version != "0.0.0" || !v.Voter || v.LastIndex == 0 || v.LastTerm == 0 || v.Status != MemberAlive {
			t.Errorf("server %+v", v)
		}
	}
	c := cluster.DefaultAutopilotConfig()
	c.CleanupDeadServers = false // a dead one is to be seen
	if res := mustApply(t, s, &cluster.SetAutopilotConfig{Config: c, CheckIndex: true}); !res.Updated {
		t.Error("not set")
	}
	if res := mustApply(t, s, &cluster.SetAutopilotConfig{Config: c, CheckIndex: true}); res.Updated {
		t.Error("set although the index was another")
	}
	dead := g.leader() // of itself it said 0
	g.crash(dead)
	eventually(t, "a dead server's contact is told", func() bool {
		h, err := s.Health(t.Context())
		if err != nil {
			return false
		}
		for _, v := range h.Servers {
			if v.ID == dead.ID() && v.Status == MemberFailed {
				return v.LastContact > 0 && !v.Healthy
			}
		}
		return false
	})
}
