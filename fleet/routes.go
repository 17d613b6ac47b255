package fleet

import (
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
)

const (
	// routesPart is about how large a message of routes is, in bytes; a model whose
	// own routes are larger goes alone.
	routesPart = 4 << 20
	// routesPause is the least time between updates to one gateway: what changes
	// meanwhile goes together.
	routesPause = 20 * time.Millisecond
	// routesWait is how long the first update waits for this server to catch up with
	// what another one may have told the gateway; old routes are better than none.
	routesWait = 2 * time.Second
)

// Routes implements pb.FleetServer: everything first, then each change as it is
// committed.
func (s *Server) Routes(_ *pb.RoutesRequest, stream pb.Fleet_RoutesServer) error {
	if _, err := s.identify(stream.Context(), "Routes"); err != nil {
		return err
	}
	s.mu.Lock()
	s.gateways++
	s.mu.Unlock()
	defer func() { s.mu.Lock(); s.gateways--; s.mu.Unlock() }()
	ctx := stream.Context()
	soon, cancel := context.WithTimeout(ctx, routesWait)
	if err := s.caught.wait(soon); err != nil {
		s.log.Debug("routes may be old: this server could not catch up", "error", err)
	}
	cancel()
	var sent *routes
	for {
		now := s.routes.now()
		for _, part := range now.since(sent) {
			if err := stream.Send(part); err != nil {
				return err
			}
		}
		sent = now
		if now.watch.WatchCtx(ctx) != nil {
			return nil
		}
		select {
		case <-time.After(routesPause):
		case <-ctx.Done():
			return nil
		}
	}
}

// routes is all routes at one index. It does not change.
type routes struct {
	index     uint64
	abandoned <-chan struct{} // of the state behind it
	models    map[string]*modelRoute
	watch     cluster.WatchSet
}

// modelRoute is one model's message with what it was made of. The same one is in
// later routes for as long as nothing of it changes.
type modelRoute struct {
	message  *pb.ModelRoute
	size     int
	versions []*cluster.ModelVersion
}

// routeTable keeps the newest routes for all gateways of this server: each change
// of the state is worked out once, and a model version is marshalled once.
type routeTable struct {
	store Store
	mu    sync.Mutex
	last  *routes
}

// now gives routes that are as new as the state.
func (t *routeTable) now() *routes {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.last == nil || changed(t.last.watch) {
		t.last = derive(t.store.State().Snapshot(), t.last)
	}
	return t.last
}

func changed(ws cluster.WatchSet) bool {
	for ch := range ws {
		select {
		case <-ch:
			return true
		default:
		}
	}
	return false
}

// served is one version of a model.
type served struct {
	model   string
	version uint64
}

// incumbents gives, for each version that only canaries serve which are not promoted, the version that the others of
// their groups serve meanwhile.
func incumbents(allocs []*cluster.Allocation) map[served]uint64 {
	type group struct {
		cluster.JobKey
		group, model string
	}
	of := func(a *cluster.Allocation) group { return group{a.JobKey(), a.TaskGroup, a.Serving.Model} }
	newest, settled := map[group]uint64{}, map[served]bool{}
	for _, a := range allocs {
		if !a.Terminal() && !a.Canary() {
			newest[of(a)] = max(newest[of(a)], a.Serving.Version)
			settled[served{a.Serving.Model, a.Serving.Version}] = true
		}
	}
	out := map[served]uint64{}
	for _, a := range allocs {
		k := served{a.Serving.Model, a.Serving.Version}
		if v, ok := newest[of(a)]; ok && !a.Terminal() && a.Canary() && !settled[k] {
			out[k] = v
		}
	}
	return out
}

// derive works the routes out: a version's endpoints are the live allocations that
// serve it. A version that is only being tried out comes last, and an alias of it means what it will take the
// place of: such canaries answer whoever asks for their number. What did not change since before is taken from there.
func derive(snap *cluster.Snapshot, before *routes) *routes {
	now := &routes{abandoned: snap.Abandoned(), models: map[string]*modelRoute{}, watch: cluster.WatchSet{}}
	now.watch.Add(snap.Abandoned())
	snap.Index(now.watch, cluster.TableModels, cluster.TableModelVersions) // two watches instead of one for each model
	now.index = snap.Index(nil, cluster.TableAllocs, cluster.TableModels, cluster.TableModelVersions)
	serving := snap.AllocsServing(now.watch, "")
	tried := incumbents(serving)
	asleep := map[served]bool{}
	for _, j := range snap.ScaledJobs(now.watch) {
		for _, g := range j.TaskGroups {
			for _, t := range g.Tasks {
				if t.Model != nil && g.Count == 0 && g.Scaling != nil && g.Scaling.Enabled && len(g.Scaling.Checks) > 0 {
					asleep[served{t.Model.Name, t.Model.Version}] = true
				}
			}
		}
	}
	endpoints := map[served][]*pb.Endpoint{}
	for _, a := range serving {
		if a.Terminal() {
			continue
		}
		k := served{a.Serving.Model, a.Serving.Version}
		endpoints[k] = append(endpoints[k], &pb.Endpoint{
			AllocId: a.ID, NodeId: a.NodeID, Address: a.Serving.Address, Ready: a.Serving.Ready,
		})
	}
	for _, m := range snap.Models(nil) {
		r := &modelRoute{versions: snap.ModelVersions(nil, m.Name)}
		aliases := m.Aliases
		if len(tried) > 0 {
			aliases = maps.Clone(m.Aliases)
			for alias, version := range m.Aliases {
				if v, ok := tried[served{m.Name, version}]; ok {
					aliases[alias] = v
				}
			}
			slices.SortStableFunc(r.versions, func(a, b *cluster.ModelVersion) int {
				_, x := tried[served{m.Name, a.Version}]
				_, y := tried[served{m.Name, b.Version}]
				switch {
				case x == y:
					return 0
				case x:
					return 1
				}
				return -1
			})
		}
		r.message = &pb.ModelRoute{Name: m.Name, Aliases: aliases}
		var old *modelRoute
		if before != nil {
			old = before.models[m.Name]
		}
		for _, v := range r.versions {
			ends := endpoints[served{m.Name, v.Version}]
			route, wakes := old.version(v), asleep[served{m.Name, v.Version}]
			switch {
			case route == nil:
				route = &pb.VersionRoute{Version: v.Version, Record: cluster.Marshal(v), Endpoints: ends, Wakes: wakes}
			case route.Wakes != wakes || !slices.EqualFunc(route.Endpoints, ends, sameEndpoint):
				route = &pb.VersionRoute{Version: v.Version, Record: route.Record, Endpoints: ends, Wakes: wakes}
			}
			r.message.Versions = append(r.message.Versions, route)
		}
		if old != nil && maps.Equal(old.message.Aliases, aliases) && slices.Equal(old.message.Versions, r.message.Versions) {
			r = old
		} else {
			r.size = proto.Size(r.message)
		}
		now.models[m.Name] = r
	}
	return now
}

// version finds what was made of a version's record, nil when it is another now.
func (r *modelRoute) version(v *cluster.ModelVersion) *pb.VersionRoute {
	if r == nil {
		return nil
	}
	i := slices.Index(r.versions, v)
	if i < 0 {
		return nil
	}
	return r.message.Versions[i]
}

func sameEndpoint(a, b *pb.Endpoint) bool {
	return a.AllocId == b.AllocId && a.NodeId == b.NodeId && a.Address == b.Address && a.Ready == b.Ready
}

// since is what a gateway lacks that has sent, nil: nothing; in parts that hold
// together. It is empty when nothing changed.
func (r *routes) since(sent *routes) []*pb.RoutesUpdate {
	full := sent == nil || sent.abandoned != r.abandoned
	u := &pb.RoutesUpdate{Index: r.index, Full: full}
	parts, size := []*pb.RoutesUpdate{u}, 0
	for _, name := range slices.Sorted(maps.Keys(r.models)) {
		m := r.models[name]
		if !full && sent.models[name] == m {
			continue
		}
		if len(u.Models) > 0 && size+m.size > routesPart {
			u.More = true
			u, size = &pb.RoutesUpdate{Index: r.index}, 0
			parts = append(parts, u)
		}
		u.Models = append(u.Models, m.message)
		size += m.size
	}
	if !full {
		for name := range sent.models {
			if r.models[name] == nil {
				u.Gone = append(u.Gone, name)
			}
		}
		if len(parts) == 1 && len(u.Models) == 0 && len(u.Gone) == 0 {
			return nil
		}
	}
	return parts
}
