package fleet

import (
	"bytes"
	"slices"

	"google.golang.org/protobuf/proto"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
)

// Routes implements pb.FleetServer: everything first, then each change as it is
// committed.
func (s *Server) Routes(_ *pb.RoutesRequest, stream pb.Fleet_RoutesServer) error {
	s.mu.Lock()
	s.gateways++
	s.mu.Unlock()
	defer func() { s.mu.Lock(); s.gateways--; s.mu.Unlock() }()

	sent := map[string][]byte{}
	full := true
	for {
		snap := s.cfg.Store.State().Snapshot()
		ws := cluster.WatchSet{}
		ws.Add(snap.Abandoned())
		update := &pb.RoutesUpdate{Full: full, Index: snap.Index(nil, cluster.TableAllocs, cluster.TableModels, cluster.TableModelVersions)}
		routes := routesOf(snap, ws)
		for _, r := range routes {
			b, err := proto.MarshalOptions{Deterministic: true}.Marshal(r)
			if err != nil {
				return err
			}
			if !bytes.Equal(sent[r.Name], b) {
				sent[r.Name] = b
				update.Models = append(update.Models, r)
			}
		}
		for name := range sent {
			if !slices.ContainsFunc(routes, func(r *pb.ModelRoute) bool { return r.Name == name }) {
				update.Gone = append(update.Gone, name)
				delete(sent, name)
			}
		}
		if full || len(update.Models) > 0 || len(update.Gone) > 0 {
			if err := stream.Send(update); err != nil {
				return err
			}
		}
		full = false
		if err := ws.WatchCtx(stream.Context()); err != nil {
			return nil
		}
		select {
		case <-snap.Abandoned():
			sent, full = map[string][]byte{}, true
		default:
		}
	}
}

// routesOf derives the routes from the state: a version's endpoints are the
// live allocations that serve it.
func routesOf(snap *cluster.Snapshot, ws cluster.WatchSet) []*pb.ModelRoute {
	type served struct {
		model   string
		version uint64
	}
	endpoints := map[served][]*pb.Endpoint{}
	for _, a := range snap.AllocsServing(ws, "") {
		if a.Terminal() {
			continue
		}
		k := served{a.Serving.Model, a.Serving.Version}
		endpoints[k] = append(endpoints[k], &pb.Endpoint{
			AllocId: a.ID, NodeId: a.NodeID, Address: a.Serving.Address, Ready: a.Serving.Ready,
		})
	}
	var routes []*pb.ModelRoute
	for _, m := range snap.Models(ws) {
		r := &pb.ModelRoute{Name: m.Name, Aliases: m.Aliases}
		for _, v := range snap.ModelVersions(ws, m.Name) {
			r.Versions = append(r.Versions, &pb.VersionRoute{
				Version: v.Version, Record: cluster.Marshal(v), Endpoints: endpoints[served{m.Name, v.Version}],
			})
		}
		routes = append(routes, r)
	}
	return routes
}
