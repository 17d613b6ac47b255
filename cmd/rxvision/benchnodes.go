package main

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"os"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/rxvision/rxvision/fleet/pb"
	"github.com/rxvision/rxvision/fleet/swarm"
	"github.com/rxvision/rxvision/pki"
)

// benchNodes are the flags of bench nodes.
type benchNodes struct {
	swarm.Config
	duration               time.Duration
	profile                string
	ca, region, token, log string
	http                   string
}

func newBenchNodes() *cobra.Command {
	var b benchNodes
	cmd := &cobra.Command{
		Use:   "nodes",
		Short: "Attach simulated agents to servers, to load a control plane without hosts",
		Long: `Plays many agents in one process, over the real streams: each registers with
plausible resources, sends heartbeats, takes allocations and reports them running after
a while, batch work complete after another. Nothing is really run. It ends after the
duration or with Ctrl-C, and prints a summary in JSON; on a terminal a line shows how it
goes.

With --ca the connections are TLS and each agent enrols with the introduction token, under
new names at every run; make one for as many uses: rxvision node intro --uses N. Without
--ca the same names, and so the same nodes, come back at the next run.`,
		Example: `  rxvision bench nodes --count 100 --server 127.0.0.1:7647
  rxvision bench nodes --count 1000 --profile gpu --server s1:7647 --server s2:7647 \
    --server s3:7647 --ca ca.pem --intro-token-file token --duration 10m`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return b.run(cmd.Context(), cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	f := cmd.Flags()
	f.IntVar(&b.Count, "count", 100, fmt.Sprintf("how many agents, at most %d", swarm.MaxNodes))
	f.StringSliceVar(&b.Servers, "server", []string{defaultRPCAddr}, "host:port of a server's agent listener; may be given several times")
	f.DurationVar(&b.duration, "duration", 0, "how long; 0: until Ctrl-C")
	f.StringVar(&b.profile, "profile", string(swarm.CPU), "what each agent offers: cpu (32 cores, 128 GiB) or gpu (96 cores, 1 TiB, 8 GPUs)")
	f.StringVar(&b.Prefix, "prefix", "", `begin of the nodes' names; default: "sim", with TLS and something random`)
	f.StringVar(&b.Datacenter, "datacenter", "dc1", "the agents' datacenter")
	f.StringVar(&b.NodePool, "node-pool", "default", "the agents' node pool")
	f.DurationVar(&b.Start, "start-delay", swarm.DefaultStart, "how long an allocation is pending before it runs")
	f.DurationVar(&b.Work, "batch-time", swarm.DefaultWork, "how long an allocation of a batch job runs")
	f.DurationVar(&b.Stop, "stop-time", 0, "how long an allocation that is told to stop runs on")
	f.StringVar(&b.http, "http-addr", "", "address that answers, in JSON, what the agents run and which devices they were given twice")
	f.IntVar(&b.PerConn, "per-connection", swarm.DefaultPerConn, "agents that share a connection; with TLS each has its own")
	f.StringVar(&b.ca, "ca", "", "PEM file of the region's CA: connect with TLS and enrol")
	f.StringVar(&b.region, "region", "global", "the region, as in its certificates")
	f.StringVar(&b.token, "intro-token-file", "", "file with the introduction token; default: the variable RXVISION_INTRO_TOKEN")
	f.StringVar(&b.log, "log-level", "warn", "debug, info, warn or error")
	return cmd
}

func (b *benchNodes) run(ctx context.Context, out, live io.Writer) error {
	if os.Getenv("GOGC") == "" {
		// A collection slows all agents of this process down at once, which real ones never
		// are: thousands of goroutines have to help. So there are few.
		debug.SetGCPercent(200)
	}
	log, err := newLogger(live, b.log)
	if err != nil {
		return err
	}
	b.Logger, b.Version, b.Profile = log, version, swarm.Profile(b.profile)
	if b.ca == "" {
		b.DialOptions = []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())}
	} else if err := b.enrolled(); err != nil {
		return err
	}
	s, err := swarm.New(b.Config)
	if err != nil {
		return err
	}
	if b.duration > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, b.duration)
		defer cancel()
	}
	hidden, err := b.show(s)
	if err != nil {
		return err
	}
	defer hidden()
	began := time.Now()
	attached, leave := context.WithCancel(context.WithoutCancel(ctx))
	defer leave()
	done := make(chan error, 1)
	go func() { done <- s.Run(attached) }()
	end := showSwarm(ctx, s, live)
	leave() // once the figures are taken
	if err := <-done; err != nil {
		return err
	}
	if problem := s.Problem(); end.Attached == 0 && problem != nil {
		return fmt.Errorf("no agent is attached: %w", problem)
	}
	return printJSON(out, struct {
		swarm.Stats
		Seconds float64 `json:"seconds"`
	}{end, time.Since(began).Seconds()})
}

// show answers what the agents run at --http-addr until hidden is called.
func (b *benchNodes) show(s *swarm.Swarm) (hidden func(), err error) {
	if b.http == "" {
		return func() {}, nil
	}
	l, err := net.Listen("tcp", b.http)
	if err != nil {
		return nil, fmt.Errorf("--http-addr: %w", err)
	}
	server := &http.Server{ReadHeaderTimeout: 10 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if err := json.NewEncoder(w).Encode(s.View()); err != nil {
			b.Logger.Debug("the answer was not taken", "error", err)
		}
	})}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			b.Logger.Error("--http-addr answers no more", "error", err)
		}
	}()
	return func() {
		_ = server.Close() // it is to end
		<-done
	}, nil
}

// showSwarm keeps a line on a terminal until ctx ends, and gives the last figures.
func showSwarm(ctx context.Context, s *swarm.Swarm, w io.Writer) (now swarm.Stats) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	drawn := false
	for before := s.Stats(); ; before = now {
		select {
		case <-tick.C:
		case <-ctx.Done():
			if drawn {
				fmt.Fprintln(w)
			}
			return s.Stats()
		}
		now = s.Stats()
		if !isTerminal(w) {
			continue
		}
		problem := ""
		if now.Attached < now.Nodes && s.Problem() != nil {
			problem = "  " + strings.Join(strings.Fields(s.Problem().Error()), " ")
		}
		drawn = true
		fmt.Fprintf(w, "\r\x1b[K%d of %d attached, %d allocations running, %d starting, %d reports/s, ack p50 %s p99 %s, %d reconnects%.80s",
			now.Attached, now.Nodes, now.Running, now.Pending, now.Acked-before.Acked, roundTime(now.AckP50), roundTime(now.AckP99), now.Reconnects, problem)
	}
}

func roundTime(d time.Duration) time.Duration {
	if d > 10*time.Millisecond {
		return d.Round(time.Millisecond)
	}
	return d.Round(10 * time.Microsecond)
}

// enrolled makes each agent get a certificate of its own.
func (b *benchNodes) enrolled() error {
	secret := os.Getenv("RXVISION_INTRO_TOKEN")
	if b.token != "" {
		text, err := os.ReadFile(b.token)
		if err != nil {
			return fmt.Errorf("introduction token: %w", err)
		}
		secret = strings.TrimSpace(string(text))
	}
	if secret == "" {
		return errors.New("with --ca the agents enrol: give an introduction token by --intro-token-file or RXVISION_INTRO_TOKEN (rxvision node intro --uses N makes one)")
	}
	m, err := pki.Load(pki.Config{CA: b.ca, Region: b.region, Role: pki.RoleNode, MayLack: true, Use: "wire", Logger: b.Logger})
	if err != nil {
		return err
	}
	b.Prefix = cmp.Or(b.Prefix, "sim-"+strings.ToLower(rand.Text()[:6]))
	e := &enroller{servers: b.Servers, token: secret, wire: m.Anonymous(pki.Only(pki.RoleServer))}
	b.Identity = e.identity
	return nil
}

// enroller gets certificates for simulated agents. Keys and certificates stay in memory.
type enroller struct {
	servers []string
	token   string
	wire    *tls.Config

	mu   sync.Mutex
	keys map[string]*ecdsa.PrivateKey // of agents whose enrolment may have been cut short
}

// lateness is how long before its end a certificate is renewed, as a share of its life.
const lateness = 3

// identity enrols an agent and gives the credentials of its connections, which get
// a new certificate when the old one comes near its end.
func (e *enroller) identity(ctx context.Context, nodeID, name string) ([]grpc.DialOption, error) {
	key, err := e.key(nodeID)
	if err != nil {
		return nil, err
	}
	csr, err := pki.NewCSR(key)
	if err != nil {
		return nil, err
	}
	cert, err := e.ask(ctx, key, func(ctx context.Context, c pb.FleetClient) (*pb.Certificate, error) {
		return c.Enroll(ctx, &pb.EnrollRequest{Token: e.token, Csr: csr, Role: string(pki.RoleNode), Name: nodeID, NodeName: name})
	})
	if err != nil {
		return nil, fmt.Errorf("enrol %s: %w", name, err)
	}
	var mu sync.Mutex
	wire := e.wire.Clone()
	wire.GetClientCertificate = func(info *tls.CertificateRequestInfo) (*tls.Certificate, error) {
		mu.Lock()
		defer mu.Unlock()
		if time.Until(cert.Leaf.NotAfter) < pki.Life(cert.Leaf)/lateness {
			next, err := e.ask(info.Context(), key, func(ctx context.Context, c pb.FleetClient) (*pb.Certificate, error) {
				return c.Renew(ctx, &pb.RenewRequest{Csr: csr, Expired: cert.Certificate})
			})
			if err != nil {
				return nil, fmt.Errorf("renew the certificate of %s: %w", name, err)
			}
			cert = next
		}
		return cert, nil
	}
	return []grpc.DialOption{grpc.WithTransportCredentials(credentials.NewTLS(wire))}, nil
}

func (e *enroller) key(nodeID string) (*ecdsa.PrivateKey, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if k := e.keys[nodeID]; k != nil {
		return k, nil
	}
	k, err := pki.NewKey()
	if err == nil {
		if e.keys == nil {
			e.keys = map[string]*ecdsa.PrivateKey{}
		}
		e.keys[nodeID] = k
	}
	return k, err
}

// ask asks the servers, one after another, for a certificate.
func (e *enroller) ask(ctx context.Context, key *ecdsa.PrivateKey, question func(context.Context, pb.FleetClient) (*pb.Certificate, error)) (*tls.Certificate, error) {
	var errs []error
	for _, i := range mathrand.Perm(len(e.servers)) {
		server := e.servers[i]
		answer, err := e.askOne(ctx, server, question)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", server, err))
			continue
		}
		certs, err := pki.ParseChain(answer.Chain)
		if err != nil {
			return nil, err
		}
		return &tls.Certificate{Certificate: answer.Chain, PrivateKey: key, Leaf: certs[0]}, nil
	}
	return nil, errors.Join(errs...)
}

func (e *enroller) askOne(ctx context.Context, server string, question func(context.Context, pb.FleetClient) (*pb.Certificate, error)) (_ *pb.Certificate, err error) {
	conn, err := grpc.NewClient("passthrough:///"+server, grpc.WithTransportCredentials(credentials.NewTLS(e.wire)))
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	return question(ctx, pb.NewFleetClient(conn))
}
