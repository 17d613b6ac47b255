package api

import (
	"net/http"
	"runtime"
	"strconv"

	"github.com/rxvision/rxvision/cluster"
)

// raftProtocol is the version of Raft's protocol that servers speak.
const raftProtocol = "3"

// frontPage stands where a browser looks first.
func (s *Server) frontPage(*request) (any, error) {
	return streamFunc(func(w http.ResponseWriter) error {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		_, err := w.Write([]byte("rxvision " + s.cfg.Version + ", server " + s.cfg.Name + " of region " + s.cfg.Region + "\n\n" +
			"This is the API, in Nomad's dialect:\n\n" +
			"    export NOMAD_ADDR=http://THIS-ADDRESS\n" +
			"    nomad node status\n" +
			"    nomad job run JOB.nomad.hcl\n"))
		return err
	}), nil
}

// leader waits for a leader and gives its Raft address.
func (s *Server) statusLeader(r *request) (any, error) {
	if err := s.fresh(r); err != nil {
		return nil, err
	}
	_, address := s.cfg.Store.Leader()
	return address, nil
}

func (s *Server) regions(*request) (any, error) { return []string{s.cfg.Region}, nil }

// selfReply is what `nomad agent-info` and others read of a server.
type selfReply struct {
	Config map[string]any               `json:"config"`
	Member member                       `json:"member"`
	Stats  map[string]map[string]string `json:"stats"`
}

func (s *Server) agentSelf(*request) (any, error) {
	_, leader := s.cfg.Store.Leader()
	reply := &selfReply{
		Config: map[string]any{
			"Region": s.cfg.Region, "Datacenter": s.cfg.Datacenter, "NodeName": s.cfg.Name,
			"Version": map[string]any{"Version": s.cfg.Version},
			"ACL":     map[string]any{"Enabled": s.cfg.ACL.Enabled},
			"Server":  map[string]any{"Enabled": true},
			"Client":  map[string]any{"Enabled": false},
			"UI":      map[string]any{"Enabled": false, "ShowCLIHints": false},
		},
		Stats: map[string]map[string]string{
			"nomad": {
				"server": "true", "leader": strconv.FormatBool(s.cfg.Store.IsLeader()), "leader_addr": leader,
				"known_regions": "1", "version": s.cfg.Version,
			},
			"raft": s.cfg.Store.Stats(),
			"runtime": {
				"arch": runtime.GOARCH, "kernel.name": runtime.GOOS, "version": runtime.Version(),
				"cpu_count": strconv.Itoa(runtime.NumCPU()), "max_procs": strconv.Itoa(runtime.GOMAXPROCS(0)),
				"goroutines": strconv.Itoa(runtime.NumGoroutine()),
			},
		},
	}
	self := Peer{ID: s.cfg.ID, Name: s.cfg.Name, Region: s.cfg.Region, Datacenter: s.cfg.Datacenter, Version: s.cfg.Version, Status: "alive"}
	if peers, _, err := s.peers(); err == nil {
		for _, p := range peers {
			if p.ID == s.cfg.ID {
				self = p
			}
		}
	}
	reply.Member = s.member(self)
	return reply, nil
}

// health is one half of the answer to a health check.
type health struct {
	OK      bool   `json:"ok"`
	Message string `json:"message"`
}

type healthReply struct {
	Server *health `json:"server,omitempty"`
	Client *health `json:"client,omitempty"`
}

// agentHealth answers 200 when the server knows a leader, else 500, with JSON in
// both cases.
func (s *Server) agentHealth(r *request) (any, error) {
	var reply healthReply
	switch what := r.query.Get("type"); what {
	case "", "server":
		reply.Server = &health{OK: s.hasLeader(), Message: "ok"}
		if !reply.Server.OK {
			reply.Server.Message = cluster.ErrNoLeader.Text
		}
		if s.cfg.Servers != nil {
			if err := s.cfg.Servers.Disk(); err != nil {
				reply.Server.OK, reply.Server.Message = false, err.Error()
			}
		}
	case "client":
		reply.Client = &health{Message: "client not enabled"}
	default:
		return nil, badRequest("unknown type %q: use server or client", what)
	}
	if reply.Server == nil || !reply.Server.OK {
		return statusBody{http.StatusInternalServerError, &reply}, nil
	}
	return &reply, nil
}

// statusBody is an answer without Nomad's index.
type statusBody struct {
	status int
	body   any
}
