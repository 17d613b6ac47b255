package api_test

import (
	"context"
	"slices"
	"strings"
	"testing"

	"github.com/rxvision/rxvision/api"
	"github.com/rxvision/rxvision/cluster"
)

// someServers is a region of which a test says who is there.
type someServers struct {
	oneServer
	peers   []api.Peer
	removed *[]string
	left    *int
}

func (s someServers) Peers() ([]api.Peer, uint64, error) { return slices.Clone(s.peers), 1, nil }

func (s someServers) Remove(_ context.Context, id string) error {
	*s.removed = append(*s.removed, id)
	if id == "ghost" {
		return cluster.Errorf(cluster.CodeNotFound, "id %q was not found in the Raft configuration", id)
	}
	return nil
}

func (s someServers) Leave(context.Context) error { *s.left++; return nil }

func TestForceLeave(t *testing.T) {
	var removed []string
	left := 0
	peer := func(id, name, status string) api.Peer {
		return api.Peer{ID: id, Name: name, Region: region, Status: status, Address: "127.0.0.1:1", HTTPAddr: "10.0.0.1:7646", Member: status != "left"}
	}
	w := newWire(t, func(c *api.Config) {
		c.Servers = someServers{removed: &removed, left: &left, peers: []api.Peer{
			peer("1", "s1", "alive"), peer("2", "s2", "failed"), peer("2new", "s2", "alive"), peer("3", "s3", "left"), peer("ghost", "s4", "failed"),
		}}
	})
	for _, id := range []string{"2", "3"} {
		w.apply(&cluster.RegisterServer{Server: &cluster.Server{ID: id, Name: "s" + id, RaftAddr: "127.0.0.1:1", Region: region}})
	}
	for _, c := range []struct {
		query   string
		status  int
		text    string
		removed string
	}{
		{"?node=s2." + region, 200, "", "2"},
		{"?node=2", 200, "", "2"},
		{"?node=nobody", 200, "", ""},
		{"?node=s3", 200, "", ""},
		{"?node=s4", 200, "", "ghost"},
		{"?node=s1", 500, "server s1 is alive: take it out with rxvision server leave s1", ""},
		{"?node=s2&prune=x", 400, "prune", ""},
		{"", 400, "missing node", ""},
		{"?node=s2&prune=1", 200, "", "2"},
	} {
		removed = nil
		r := w.do("PUT", "/v1/agent/force-leave"+c.query, "")
		if got := strings.Join(removed, " "); r.status != c.status || !strings.Contains(r.body, c.text) || got != c.removed {
			t.Errorf("force-leave%s: %d %q, removed %q", c.query, r.status, r.body, got)
		}
	}
	snap := w.store.State().Snapshot()
	if snap.Server(nil, "2") != nil || snap.Server(nil, "3") == nil {
		t.Error("pruned is what was not asked for, or not what was")
	}
	client, err := api.NewClient(w.url, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	if addr, err := client.ServerAddr(t.Context(), "s1"); err != nil || addr != "http://10.0.0.1:7646" {
		t.Errorf("%q, %v", addr, err)
	}
	if _, err := client.ServerAddr(t.Context(), "s3"); cluster.CodeOf(err) != cluster.CodeNotFound {
		t.Errorf("the address of a server that has left: %v", err)
	}
	if err := client.Leave(t.Context()); err != nil || left != 1 {
		t.Errorf("leave: %v, asked %d times", err, left)
	}
}
