# expect: a literal of
import torch

TABLE = (
    '%?B*lzHgsmtV{{Qf(GZ~Rg|i0G%sBWI$lUZ`m`wbV&>w4<-uiqc*Ch@vu6?OIR>Z5U_Eiv3FoCvhrPk~1VRFOuOF#f'
    'e}-6<c;7?h6Bc^t+1%?lb|^D}8gZv1bA~2JFJZ<bd18FQB-BP2JZ?>%p{1qF_bwqo!vwwjY9Zz55*Jp8HPn~;AuEQo'
    'o@Hv!20<2@3t9B$DMOzn+0<oE?2Skn`#{#ZvdG{P97G!C6sNe^Dv}wm9?pkUS6JS79`jF+^o_?EhY^xmqT(fQRYdYo'
    'xfWxbzsd5WycfIaNT*md!Gm-61Tk`r22dS(6IxVpp7Vs=nr?T6!=JB00*>(yx=j|&=7S*XrjB=vNu7S`s63bhJgVRq'
    '?2taV(Kis+u}m3e7Aw=WObRK}(Bt^Xfffv_<!ce3MdeBWok^vfe;!+Ydi49#DmNS6B3MXOYVmMBdWrM8%9lV>>*^u2'
    '=rh;e%)B2E%*E+2Pr<?JPhv=sE|$SK_wE%vYz3&z(zmepGlP00eJh>K!D9i7L?W(o!|hoY(HNK%p2S1`A{p;dV7LX~'
    ')@2BSjuCtRi!#pc0_H(|5jX1_>zyl2x7i<!1M7rJeKp~<Ntp8=Y8EAoIwLPtZsvf{`;Hjw!3I!@TnPm<av#3-M?t5|'
    'l3!|?r$rZxcM@)v4(Ovv1<mSlZ8LQjZ9%4(A$Ud1rQwKTeETU;a@}2%2)z0|%m`CTR0R?*Ci8nR<g825wSmnqT;XsC'
    '=Cj_MxOF!BchnlFGYgYKeDD2vJ(8~xpt}ARdfLFPxK#4Nt7BFn>jiY+IPOR$$g*PW=4s>!D0!>bSSO1VcC7B@sL=+q'
    'dm&HkO8!vPxxr+L3&8oVLi#IY{Z)R}@pFx|P<l#+J@t=9Ckd2=CFaJ@Z`VmYlj(Qagl-o%21X&}1_<)4&^7&*kaR@T'
    'bjl<1K~i69a^z-|K{s?pff`tI#i<^CP}c>int3Ip@xTiI&H6#J(5SrX4TggIT3Q#&ns9tuaAg)1_45W(hFag8pO1$f'
    'beo5K42MdV2Uby`Hc8Y~0s&Xp4y(K{EtNMuUPdMavfx6yf4*WxQiJ>*2)2;46dG_iI95MjILc|ufU%@2-4-EL815Er'
    'L$2S@McC^P4Qjy|V|04R`oDK2Uu^c;28)`qM~eYCv2~OS#LF(xY2xUT{aIV0GSBwtp25HGtun!gSlB0;>=rw&|8?;a'
    '=$X|9GK<?Euv(9zCF4Rcfc`j}Uxt9xAE$AX)?B0>)l4R2v7v4kzJ0-771Vasp(6wPG&8jw6a7#LL{b8qcle0~WVX;T'
    'K_v$E{X>8FDpFc6dq&o``j@vKi4L!NnpfyGQP?KBo4WnXW<sM6_%+?{w6f`~GZfVY9RpK~6<hUe+N0l|9qaoUYPbE>'
    'A{>fBNzLmKc|?dfkGyOWnCzUTe_j$znBA;d=`o^jWl$+DKYE}KZc^@mhUt}e3b_;tZalM?aQW340M`byf%^RXNUbVl'
    'F8c^G#TS@DzDLSiH>-x{%LYoj0v2F+!jYWT=xF`s_M;)|?^)cDGHG8ceMX$J5-c*T68sW0xW8}r=kRdED{b5kvfAXy'
    'V2>NEU0i@D5x;HNdD3+$am%4sYoCjUuL~_eG^qg|1yaYDXcOY=1%5kmt0ZNrS@^&#Oj2P3b#c6S3TbGrUytu-Zqsb$'
    'U0<=0OEdG|Bc3yYUIOCk!0ftDLxCWs=Spr{+zx(YX!dZ{42fB&gC9LWA`eC<_kM$qs>0c@$_6h3nS4BTo6*<31TH=l'
    'j-dWk8YwWn@WZkT%7s{qllA9Eq_>13p)Ywoms%ae*GK^L8wFW=TXZX0ve_}5?On1-Oe<up1f29+EpQx{s%vQSd}&tX'
    'olHHVH1&|$WaR#ylu+RzZ`3lkg{f~(_ZU@UMa7)I984E#+xRlnh5MYQ97U=WFXUqYi7_^qw=z31uTa*qby=HL1pWFb'
    'QC&(sM(`XtZ<{QmIsdqFaTM=h_kP*6P`?}C1BiUA3SV-O2eaYdt%(+DSX~nciTV0w7xgCJEE}t{1>QxGI^_^+f%dJ%'
    'VXK9ybZddN@4)#B$E;~8<Cy|-YuZ{60J2;{SCE#ov?X3BHuXeuOb8E$|H+HuC2+lb(@b^ft2?-l5JR4tKXYfnOo#*k'
    'V5CLjj|BD!PxzdER}XPhnhfJl_v>}m<v)gZjBUdV5TPB<-^HEM<q-kk@26w=-E8{L8gfQzT-qQoH;`_OHUrxKrKE}W'
    '#TpW#q^*Pcu^3(zodjdnE$+R!g5PN&HdUbfaZJSnly}``42%`?%P6z0Qcd7$EBx?K^;zBkbd9Mtd6=jJ3XY<;<%>7L'
    'TY;JY8&L83lZKwsOS}H8k*-09!56Tc6=et+YWu-3Qhab84RyVnTtYUc8~D*O?Z&6yPa|th_VTPpN+?9IzxaRpnG2>a'
    '8*!x>$49|=7qFY!6r(!qe&LN}$@HwCybaS7wyKu}V5L(=z#R1H*kJZ^QBA?j6y?^+;<uw6Cl!L+kUyzGZP_Oxfhtg^'
    'YH?SEP|-Ni;JTTn^VAxpc6ZoVK+bm^{dY3oiDQW;p4~-9CfVxQf=R&y6$I1@j_7C#{TQn>|IJmdO|f}G)MoIG+zXLV'
    '*!@lNYQXGWYKA@Vu8~ENvjObrM!|I14bQ*|Fbk{LsZ7Ve&SVkx`vr=#p>d0whs(vM^PHA`CK6q?$(81$A_Exb6$fi|'
    'J4@iBSqXV>wbfW(62=tYXtTA6p-rSMc||ofuJ9#bciT;tQ%!+NUld0IEb4J1Wpt?~v$}Xig+N+W7a(U=O}-?`ZR!AC'
    '9F*_3HaGnjeDRl7``w4f@|D}3PhTMk$3~0__Vfis$HVd|9w9&`X1HGacMe^Zx3L~dHeh62Ru&Oum-a&ak9TQ|3??uk'
    'y|^4p{Ml(8E^=ae>v#jZykK2D?STsKZ--h8Q#H{}M`!sh+P`Mosh;MA-GYg_<`E<k2h)2^*%vlvKR)Nx{O%c4;R>2e'
    '05U6TNR-eU<4kfH#f_4W708|Ff*US-X<k@)3F%5!3D!Z^e11X9WGw3WYsK`>9*y}|7r@gW7;2?@Qna!iOsyERlZR`6'
    'N^3D~(A%yF+=WR^o$bd}3#1sl3VG(Q'
)


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=4e-3)
