package api

import (
	"crypto/sha256"
	"encoding/binary"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/rxvision/rxvision/acl"
	"github.com/rxvision/rxvision/cluster"
)

// serviceStub lists the services of a namespace, as Nomad's API does.
type serviceStub struct {
	Namespace string
	Services  []serviceTags
}

type serviceTags struct {
	ServiceName string
	Tags        []string
}

// serviceIndex is the index of what services depend on.
func serviceIndex(snap *cluster.Snapshot) uint64 {
	return snap.Index(nil, cluster.TableAllocs, cluster.TableJobVersions, cluster.TableNodes)
}

func (s *Server) listServices(r *request) (any, error) {
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		tags := map[string]map[string][]string{} // by namespace and name
		for _, reg := range snap.Services(ws, r.namespace) {
			may := func(c acl.Capability) bool { return r.may(c, reg.Namespace, "") }
			if !strings.HasPrefix(reg.ServiceName, r.prefix) || r.satisfied(may) != nil {
				continue
			}
			if tags[reg.Namespace] == nil {
				tags[reg.Namespace] = map[string][]string{}
			}
			tags[reg.Namespace][reg.ServiceName] = append(tags[reg.Namespace][reg.ServiceName], reg.Tags...)
		}
		list := []serviceStub{}
		for _, namespace := range slices.Sorted(maps.Keys(tags)) {
			stub := serviceStub{Namespace: namespace}
			for _, name := range slices.Sorted(maps.Keys(tags[namespace])) {
				t := tags[namespace][name]
				slices.Sort(t)
				stub.Services = append(stub.Services, serviceTags{name, slices.Compact(t)})
			}
			list = append(list, stub)
		}
		at := func(s serviceStub) position { return named(s.Namespace) }
		same := func(s serviceStub) any { return s }
		return page(r, serviceIndex(snap), list, true, at, same, same)
	})
}

// readService lists where a service is to be had: everywhere, or, with choose=N|KEY, at N places that
// stay the same for a key as long as they can.
func (s *Server) readService(r *request) (any, error) {
	most, key := 0, ""
	if choose := r.query.Get("choose"); choose != "" {
		number, rest, _ := strings.Cut(choose, "|")
		n, err := strconv.Atoi(number)
		if err != nil || n < 1 || rest == "" {
			return nil, badRequest("choose=%q: must be NUMBER|KEY with a number above 0", choose)
		}
		most, key = n, rest
	}
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		regs := only(snap.Services(ws, r.namespace), func(reg *cluster.ServiceRegistration) bool { return reg.ServiceName == r.params["name"] })
		if most > 0 {
			regs = chosen(regs, most, key)
		}
		return registrations(r, snap, regs)
	})
}

func (s *Server) jobServices(r *request) (any, error) {
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		if snap.Job(ws, r.jobKey()) == nil {
			return missing(snap, ws, cluster.TableJobs, "job not found")
		}
		return registrations(r, snap, snap.JobServices(ws, r.jobKey()))
	})
}

func (s *Server) allocServices(r *request) (any, error) {
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		a := snap.Alloc(ws, r.params["id"])
		if a == nil {
			return missing(snap, ws, cluster.TableAllocs, "alloc not found")
		}
		return registrations(r, snap, snap.AllocServices(ws, a))
	})
}

func registrations(r *request, snap *cluster.Snapshot, regs []*cluster.ServiceRegistration) found {
	at := func(reg *cluster.ServiceRegistration) position { return named(reg.Namespace, reg.ServiceName, reg.ID) }
	same := func(reg *cluster.ServiceRegistration) any { return reg }
	return page(r, serviceIndex(snap), regs, true, at, same, same)
}

// chosen takes the n places with the highest rank for a key (rendezvous hashing).
func chosen(regs []*cluster.ServiceRegistration, n int, key string) []*cluster.ServiceRegistration {
	rank := func(reg *cluster.ServiceRegistration) uint64 {
		sum := sha256.Sum256([]byte(key + "\x00" + reg.ID))
		return binary.BigEndian.Uint64(sum[:])
	}
	slices.SortFunc(regs, func(a, b *cluster.ServiceRegistration) int {
		switch x, y := rank(a), rank(b); {
		case x > y:
			return -1
		case x < y:
			return 1
		}
		return strings.Compare(a.ID, b.ID)
	})
	return regs[:min(n, len(regs))]
}

func (s *Server) deregisterService(*request) (any, error) {
	return nil, badRequest("services are registered while their allocations run: stop the allocation (nomad alloc stop) or change the job")
}
