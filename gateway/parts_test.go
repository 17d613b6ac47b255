package gateway

import (
	"testing"

	"github.com/rxvision/rxvision/fleet/pb"
)

// TestRoutesInParts gives all routes in three messages, twice: every table that
// requests see is whole, and the second full update removes what it does not name.
func TestRoutesInParts(t *testing.T) {
	r := startRegion(t)
	g, _ := startGateway(t, r, nil)
	named := func(name string) *pb.ModelRoute {
		return &pb.ModelRoute{Name: name, Versions: routesFor(nil).Models[0].Versions}
	}
	first := g.router.current.Load()
	r.send(&pb.RoutesUpdate{Full: true, More: true, Models: []*pb.ModelRoute{named("a"), named("b")}})
	r.send(&pb.RoutesUpdate{More: true, Models: []*pb.ModelRoute{named("c")}})
	r.send(&pb.RoutesUpdate{Models: []*pb.ModelRoute{named("d")}})
	until(t, g, func(tb *table) bool {
		if tb != first && len(tb.models) != 4 {
			t.Errorf("a table of %d models was shown", len(tb.models))
		}
		return tb != first
	})
	r.send(&pb.RoutesUpdate{Full: true, More: true, Models: []*pb.ModelRoute{named("b")}})
	r.send(&pb.RoutesUpdate{Models: []*pb.ModelRoute{named("e")}})
	until(t, g, func(tb *table) bool { return tb.models["e"] != nil })
	if tb := g.router.current.Load(); len(tb.models) != 2 || tb.models["b"] == nil {
		t.Errorf("after the second full update %d models are known", len(tb.models))
	}
	r.send(&pb.RoutesUpdate{More: true, Gone: []string{"b"}})
	r.send(&pb.RoutesUpdate{Models: []*pb.ModelRoute{named("f")}})
	until(t, g, func(tb *table) bool { return tb.models["f"] != nil && tb.models["b"] == nil && tb.models["e"] != nil })
}
