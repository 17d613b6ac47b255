package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/pflag"

	"github.com/rxvision/rxvision/fleet"
	"github.com/rxvision/rxvision/pki"
)

// introTokenEnv is the variable of an introduction token. There is no flag for it:
// every user of the host can read a command line.
const introTokenEnv = "RXVISION_INTRO_TOKEN"

// maxTokenFile bounds a file with an introduction token, in bytes.
const maxTokenFile = 4096

// identityFlags say how an agent or a gateway comes by its certificate. Without a
// CA there is no TLS.
type identityFlags struct {
	ca, region, tokenFile string
}

func (i *identityFlags) add(f *pflag.FlagSet) {
	f.StringVar(&i.ca, "tls-ca", "", "PEM file of the region's CA, ca.pem: speak mTLS to servers and workers; without it plain text, on loopback only")
	f.StringVar(&i.ca, "ca", "", "the same as --tls-ca")
	f.StringVar(&i.tokenFile, "intro-token-file", "", "file with an introduction token (rxvision node intro) to enrol with, needed the first time; default: the variable "+introTokenEnv)
	f.StringVar(&i.region, "region", "global", "the region")
	_ = f.MarkHidden("ca") // the flag is there
}

func (i *identityFlags) tls() bool { return i.ca != "" }

// check refuses to speak plain text with servers on other machines.
func (i *identityFlags) check(servers []string) error {
	var faults []error
	for _, s := range servers {
		if !i.tls() {
			faults = append(faults, loopbackOnly(map[string]string{"server": s}))
		}
	}
	if err := errors.Join(faults...); err != nil {
		return fmt.Errorf("%w\nWith --tls-ca, the region's CA, connections are mTLS", err)
	}
	return nil
}

// token gives the introduction token that there is now.
func (i *identityFlags) token() (string, error) {
	if i.tokenFile == "" {
		if t := strings.TrimSpace(os.Getenv(introTokenEnv)); t != "" {
			return t, nil
		}
		return "", fmt.Errorf("there is no introduction token: make one with `rxvision node intro` and give it by --intro-token-file or %s", introTokenEnv)
	}
	info, err := os.Stat(i.tokenFile)
	if err != nil {
		return "", fmt.Errorf("introduction token: %w", err)
	}
	if !info.Mode().IsRegular() || info.Size() > maxTokenFile {
		return "", fmt.Errorf("introduction token: %s is no file of at most %d bytes", i.tokenFile, maxTokenFile)
	}
	if info.Mode().Perm()&0o007 != 0 {
		return "", fmt.Errorf("introduction token: %s can be read by every user of this host (mode %04o): run chmod 600 %s", i.tokenFile, info.Mode().Perm(), i.tokenFile)
	}
	b, err := os.ReadFile(i.tokenFile)
	if err != nil {
		return "", fmt.Errorf("introduction token: %w", err)
	}
	token := strings.TrimSpace(string(b))
	if token == "" {
		return "", fmt.Errorf("introduction token: %s is empty", i.tokenFile)
	}
	return token, nil
}

// holder opens what keeps the certificate of a node or gateway, in dir.
func (i *identityFlags) holder(id pki.Identity, nodeName, dir string, servers []string, renewAt float64, log *slog.Logger, reg prometheus.Registerer) (*pki.Holder, error) {
	return pki.OpenHolder(pki.HolderConfig{
		Dir: dir, CA: i.ca, Identity: id, RenewAt: renewAt, Use: "wire", Logger: log, Registerer: reg,
		Remote: &fleet.Remote{Servers: servers, Role: id.Role, Name: id.Name, NodeName: nodeName, Token: i.token},
	})
}

// gatewayIdentity says who a gateway is: by certificate files that an operator
// made, or by enrolment.
type gatewayIdentity struct {
	identityFlags
	cert, key string
}

// open gives the gateway's certificates and what keeps them fresh; both nil without TLS.
func (g *gatewayIdentity) open(name, dataDir string, servers []string, log *slog.Logger, reg prometheus.Registerer) (m *pki.Material, keep func(context.Context) error, err error) {
	switch {
	case !g.tls() && g.cert+g.key == "":
		return nil, nil, nil
	case !g.tls():
		return nil, nil, errors.New("--tls-cert and --tls-key need --tls-ca, the region's CA")
	case g.cert+g.key != "":
		m, err = pki.Load(pki.Config{
			CA: g.ca, Cert: g.cert, Key: g.key, Region: g.region, Role: pki.RoleGateway, Use: "wire", Logger: log, Registerer: reg,
		})
		if err != nil {
			return nil, nil, err
		}
		return m, m.Run, nil
	}
	id := pki.Identity{Role: pki.RoleGateway, Region: g.region, Name: name}
	h, err := g.holder(id, "", filepath.Join(dataDir, "identity"), servers, pki.RenewServingAt, log, reg)
	if err != nil {
		return nil, nil, err
	}
	return h.Material(), h.Keep, nil
}
