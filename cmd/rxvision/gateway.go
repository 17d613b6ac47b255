package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"

	"github.com/rxvision/rxvision/fleet"
	"github.com/rxvision/rxvision/gateway"
	"github.com/rxvision/rxvision/oip"
	"github.com/rxvision/rxvision/pki"
)

func newGateway() *cobra.Command {
	var (
		g      gatewayConfig
		logLvl string
	)
	cmd := &cobra.Command{
		Use:   "gateway",
		Short: "Run a gateway: the front door for inference",
		Long: `Runs a gateway. With --tls-ca it speaks mTLS with servers and workers: as who its
certificate says (--tls-cert, --tls-key), or as --name, enrolled with an introduction
token (rxvision node intro -role gateway). An enrolled gateway renews its certificate by
itself; without servers it goes on for at least two days.

SIGHUP reads certificates and the log level again.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, level, err := newLeveledLogger(cmd.ErrOrStderr(), logLvl)
			if err != nil {
				return err
			}
			if err := os.MkdirAll(g.dataDir, 0o700); err != nil {
				return fmt.Errorf("data folder: %w", err)
			}
			g.Logger, g.Registry, g.Version, g.RoutesFile = log, newMetrics(), version, filepath.Join(g.dataDir, "routes.pb")
			g.reload = &reload{cmd: cmd, fresh: newGateway, log: log, apply: func(_, value string) error { return setLevel(level, value) }}
			return runGateway(cmd.Context(), g)
		},
	}
	host, err := os.Hostname()
	if err != nil {
		host = "gateway"
	}
	f := cmd.Flags()
	f.StringVar(&g.dataDir, "data-dir", filepath.Join(defaultDataDir, "gateway"), "folder where the last routes, and the certificate, are kept")
	f.StringVar(&g.Name, "name", host, "this gateway's name, unique in the region")
	f.StringSliceVar(&g.servers, "server", []string{defaultRPCAddr}, "host:port of a server's gateway listener; may be given several times")
	f.StringVar(&g.addr, "http-addr", defaultGatewayAddr, "address of the inference API")
	f.StringVar(&g.httpCert, "http-tls-cert", "", "PEM file of a certificate: serve the inference API by HTTPS")
	f.StringVar(&g.httpKey, "http-tls-key", "", "PEM file of its key")
	g.identity.add(f)
	f.StringVar(&g.identity.cert, "tls-cert", "", "PEM file of the gateway's certificate (rxvision tls cert create -gateway); default: enrol with an introduction token")
	f.StringVar(&g.identity.key, "tls-key", "", "PEM file of its key")
	f.BoolVar(&g.acl, "acl", true, "ask callers for tokens that may infer (Authorization: Bearer, or X-Nomad-Token); off without --tls-ca")
	f.Int64Var(&g.MaxBody, "max-body-bytes", gateway.DefaultMaxBody, "largest request or answer")
	f.IntVar(&g.MaxInFlight, "max-in-flight", gateway.DefaultMaxInFlight, "requests answered at once; more get 429")
	f.IntVar(&g.MaxHeld, "max-held", gateway.DefaultMaxHeld, "requests that may wait for a replica; more get 503")
	f.DurationVar(&g.Hold, "hold", gateway.DefaultHold, "how long a request waits for a replica")
	f.DurationVar(&g.Timeout, "timeout", gateway.DefaultTimeout, "of a whole request")
	f.StringVar(&logLvl, "log-level", "info", "debug, info, warn or error")
	addConfig(cmd, func() error { return g.check() }, "log-level")
	return cmd
}

// gatewayConfig is what the flags of a gateway say.
type gatewayConfig struct {
	gateway.Config
	dataDir, addr     string
	servers           []string
	identity          gatewayIdentity
	httpCert, httpKey string // of HTTPS
	acl               bool
	reload            *reload
}

func (g *gatewayConfig) check() error {
	faults := []error{g.identity.check(g.servers)}
	if g.httpCert+g.httpKey == "" {
		faults = append(faults, loopbackOnly(map[string]string{"http-addr": g.addr}))
	}
	return errors.Join(faults...)
}

// connect makes the connection to the servers: to the first of them, in an order
// drawn by lot, that answers.
func (g *gatewayConfig) connect(m *pki.Material) (*grpc.ClientConn, error) {
	wire := insecure.NewCredentials() // loopback only
	if m != nil {
		wire = credentials.NewTLS(m.Client(pki.Only(pki.RoleServer)))
	}
	all := manual.NewBuilderWithScheme("servers")
	var state resolver.State
	for _, i := range rand.Perm(len(g.servers)) {
		state.Addresses = append(state.Addresses, resolver.Address{Addr: g.servers[i], ServerName: g.servers[i]})
	}
	all.InitialState(state)
	return grpc.NewClient("servers:///",
		grpc.WithResolvers(all),
		grpc.WithTransportCredentials(wire),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			if m != nil && m.Leaf() == nil { // a connection without a certificate would stay one
				return nil, errors.New("this gateway has no certificate yet")
			}
			return new(net.Dialer).DialContext(ctx, "tcp", address)
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(fleet.MaxRoutes)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second}),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: quickBackoff, MinConnectTimeout: time.Second}),
	)
}

func runGateway(ctx context.Context, c gatewayConfig) error {
	identity, keep, err := c.identity.open(c.Name, c.dataDir, c.servers, c.Logger, c.Registry)
	if err != nil {
		return err
	}
	if identity != nil {
		c.reload.more = append(c.reload.more, identity.Reload)
		c.WorkerTLS = func(allocID string) *tls.Config { return identity.Client(pki.Exactly(pki.RoleWorker, allocID)) }
	}
	var https *pki.Material
	if c.httpCert+c.httpKey != "" {
		if https, err = pki.Load(pki.Config{Cert: c.httpCert, Key: c.httpKey, Use: "https", Logger: c.Logger, Registerer: c.Registry}); err != nil {
			return fmt.Errorf("--http-tls-cert and --http-tls-key: %w", err)
		}
		c.reload.more = append(c.reload.more, https.Reload)
	}
	conn, err := c.connect(identity)
	if err != nil {
		return err
	}
	defer conn.Close()
	c.Servers = conn
	if c.acl && identity != nil {
		c.Authorizer = gateway.NewTokenCache(gateway.FleetTokens(conn), c.Registry)
	}
	gw, err := gateway.New(c.Config)
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", c.addr)
	if err != nil {
		return fmt.Errorf("listen for inference: %w", err)
	}
	srv := gw.HTTPServer()
	if https != nil {
		l = tls.NewListener(l, https.HTTPS(pki.Peers{}))
	} else {
		srv.Handler = guard(srv.Handler, c.addr, func(w http.ResponseWriter, why string) {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusForbidden)
			_ = json.NewEncoder(w).Encode(oip.ErrorResponse{Error: why}) // the client may be gone
		})
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return c.reload.run(ctx) })
	g.Go(func() error { return gw.Run(ctx) })
	if keep != nil {
		g.Go(func() error { return keep(ctx) })
	}
	if https != nil {
		g.Go(func() error { return https.Run(ctx) })
	}
	g.Go(func() error {
		if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	})
	g.Go(func() error {
		<-ctx.Done()
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		if err := srv.Shutdown(end); err != nil { // requests in flight are answered first
			return srv.Close()
		}
		return nil
	})
	c.Logger.Info("gateway is up", "addr", c.addr, "servers", c.servers, "tls", identity != nil, "version", version)
	return g.Wait()
}

// quickBackoff finds a server again soon after it came back.
var quickBackoff = backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second}
